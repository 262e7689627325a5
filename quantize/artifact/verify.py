"""A finished artifact is verified: every hash, and the output of the loaded model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.artifact.load import check_hashes, checked_on_meta, fill, load, read_manifest, without_class
from quantize.artifact.writer import PROBE
from quantize.checkpoint.untrusted_files import read_all
from quantize.errors import QuantizeError
from quantize.graph.export import forward_switches, quiet
from quantize.graph.refusal import place_of
from quantize.transforms import equivalence

LOAD_TOLERANCE = 1e-2  # another machine sums in another order, which can move an activation to the next integer


def verify_artifact(directory: Path, digest: str | None = None, trust_remote_code: bool = False) -> dict[str, Any]:
    """Check the hash of every file, load the model, and compare its output on the probes with the recorded one.

    Args:
        directory: an artifact. One that was rounded without the model has no output to compare with, and only its
            tensors are checked to have their places, if transformers has its class.
        digest: the digest that the run printed; None trusts the one in the manifest.
        trust_remote_code: as in `quantize.load`.

    Returns:
        files: how many there are.
        difference: that of the outputs; None without any.
        parity, digest: the manifest's.
        why: why a model without recorded output was not loaded; '' if it was.

    Raises:
        UsageError: the directory is no artifact.
        QuantizeError: a file has changed, or the model computes something else.
    """
    files, manifest = check_hashes(directory, digest), read_manifest(directory)
    if manifest.get("model_free"):
        if not (why := without_class(directory)):
            load(directory, read=checked_on_meta)
        told = {"why": why, "parity": manifest["parity"], "digest": manifest["digest"]}
        return {"files": files, "difference": None, **told}
    (inputs, recorded), model = (
        read_probe(directory),
        load(directory, engine="reference", trust_remote_code=trust_remote_code),
    )
    output = run_probe(model, inputs)
    if recorded.shape != output.shape or not recorded.is_floating_point():
        raise QuantizeError(
            f"{directory / PROBE} holds an output {list(recorded.shape)} of {recorded.dtype}, where the model gives "
            f"{list(output.shape)} of {output.dtype}"
        )
    found = equivalence.relative(output, recorded)
    if found > LOAD_TOLERANCE:
        raise QuantizeError(f"{directory} loads, but its output differs from the recorded one by {found:.1e}")
    return {"files": files, "difference": found, "parity": manifest["parity"], "digest": manifest["digest"]}


def read_probe(directory: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Return an artifact's inputs to verify with, each [samples, ...], and the output that was recorded for them.

    Raises:
        QuantizeError: the file is damaged or holds something else.
    """
    inputs = read_all(directory / PROBE)
    output = inputs.pop("output", None)
    if output is None:
        raise QuantizeError(f"{directory / PROBE} holds no output to compare with")
    counts = {len(x) if x.dim() else 0 for x in inputs.values()}
    if len(counts) != 1 or 0 in counts:
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in inputs.items()) or "nothing"
        raise QuantizeError(f"{directory / PROBE} holds {shapes} as inputs; each has a first axis of as many samples")
    return inputs, output


def written_output(
    skeleton: nn.Module, directory: Path, settings: dict[str, Any], given: Mapping[str, Tensor]
) -> Tensor:
    """Return what the model of written files gives for the last token of each input [batch, ...].

    Raises:
        QuantizeError: the model does not run, so one of its linears is more than a linear.
    """
    return run_probe(fill(skeleton, directory, settings), given)


def run_probe(model: nn.Module, given: Mapping[str, Tensor]) -> Tensor:
    """Return `last_token` of a model that may not run.

    Raises:
        QuantizeError: it does not run.
    """
    try:
        with quiet():
            return last_token(model, given)
    except Exception as error:  # code of other authors may raise anything
        where = f", {place}" if (place := place_of(error)) else ""
        raise QuantizeError(
            f"the quantized model does not run{where}; leave out with --ignore the linear at fault"
        ) from error


@torch.no_grad()
def last_token(model: nn.Module, given: Mapping[str, Tensor]) -> Tensor:
    """Run a model sample by sample, as when its output was recorded, and return its first output at the last token."""
    samples = zip(*(x.split(1) for x in given.values()), strict=True)
    results = [model(**dict(zip(given, sample, strict=True)), **forward_switches(model)) for sample in samples]
    return torch.cat([at_last_token(found if isinstance(found, Tensor) else found[0]) for found in results])


def at_last_token(output: Tensor) -> Tensor:
    """Return the last token of an output [batch, tokens, channels], which depends on all others; others stay whole."""
    return (output[:, -1] if output.dim() == 3 else output).contiguous()
