"""An artifact as a checkpoint of the compressed-tensors format, which transformers and vLLM load.

The package of that name is not needed to write one; where it is installed, the checkpoint is loaded and compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from quantize.artifact.load import load, read_linear, read_manifest
from quantize.artifact.writer import PROBE, ArtifactWriter, as_json
from quantize.checkpoint.checkpoint import read_config
from quantize.checkpoint.meta_model import build_skeleton
from quantize.checkpoint.tensor_files import index_tensors, read_tensor
from quantize.checkpoint.untrusted_files import read_all
from quantize.errors import QuantizeError, UsageError, reason
from quantize.export.comparison import copy_with_replaced_linears, first_outputs, relative_error, with_float_activations
from quantize.export.compressed_tensors.activation_ranges import input_divisors
from quantize.export.compressed_tensors.format import NAME, quantization_config, stored
from quantize.formats import get_format
from quantize.graph.export import quiet
from quantize.recipe.scheme import ActivationArgs, Scheme

ROTATION = ("a rotation of activations", "`online_hadamard = false` in the pass that rotates")
ONLINE = {"hadamard": ROTATION, "dual": ROTATION, "shift": ("a bias on what is rounded", "no pass `noisy_bias`")}
ROUNDING = 64  # last bits, relative to the output: what sums in another order may differ by


def export_compressed_tensors(directory: Path, writer: ArtifactWriter, calibration: Path | None) -> dict[str, Any]:
    """Write the safetensors shards, their index and `config.json`, one shard in memory at a time; then compare.

    Args:
        directory: an artifact.
        writer: open; what else belongs to a model is the caller's.
        calibration: data for NVFP4, as for quantizing; None takes the bundled prose.

    Returns:
        What `compressed_tensors_parity` measured, or `{"transformers": "not verified"}` where the package is
        not installed.

    Raises:
        UsageError: the format cannot express what the artifact does.
        QuantizeError: damaged files, or transformers computes something else.
    """
    settings, config = read_manifest(directory)["quantization"], read_config(directory)
    scheme, skeleton = Scheme(**settings["scheme"]), build_skeleton(config)
    check_expressible(settings, scheme, skeleton)
    number_format = get_format(scheme.weights.format)
    if not number_format.has_global_scale and calibration is not None:
        raise UsageError("only NVFP4 checkpoints hold ranges of activations; leave --calibration out")
    divisors = input_divisors(directory, calibration) if number_format.has_global_scale else {}
    for shard, tensors in shards(directory, settings, divisors):
        writer.add(shard, tensors)
    writer.write_index()
    own = {"dtype": "bfloat16"} if number_format.element == "e2m1" else {}
    entry = quantization_config(scheme, ignored(skeleton, settings["modules"]))
    writer.write("config.json", as_json({**config, **own, "quantization_config": entry}))
    if find_spec("compressed_tensors") is None:
        return {"transformers": "not verified"}
    return compressed_tensors_parity(directory, writer.directory, scheme)


def check_expressible(settings: Mapping[str, Any], scheme: Scheme, skeleton: nn.Module) -> None:
    """The format has a place for all that the artifact does.

    Raises:
        UsageError: names all that it has none for, and how to quantize without.
    """
    found = dict(obstacles(settings, scheme.activations, skeleton))
    if found:
        remedies = dict.fromkeys(found.values())
        raise UsageError(f"{NAME} has no place for {' or '.join(found)}; quantize with {' and '.join(remedies)}")


def obstacles(
    settings: Mapping[str, Any], common: ActivationArgs | None, skeleton: nn.Module
) -> Iterator[tuple[str, str]]:
    """What the format has no place for, and what to quantize with instead."""
    if get_format(name := settings["scheme"]["weights"]["format"]).element == "level":
        yield f"{name} weights", '`format = "int"` in [weights]'
    if settings.get("prefix"):
        yield "a prefix of tokens", "no `prefix`"
    if settings.get("kv_cache"):
        yield "keys and values with a scale for each token", "no table `kv_cache`"
    for path, entry in settings["modules"].items():
        if not isinstance(module := skeleton.get_submodule(path), nn.Linear):
            yield f"{path}, which is a {type(module).__name__} and no nn.Linear", f"--ignore {path}"
        yield from (ONLINE[online["kind"]] for online in entry.get("online", ()))
        args = ActivationArgs(**entry["activations"]) if "activations" in entry else common
        if args is not None and args.runtime_smooth is not None:
            yield "runtime smooth", "no pass `runtime_smooth`"
        if args is not None and args.clip_ratio != 1:
            yield "clipped activations", "`clip_ratio = 1.0` in [activations] and no pass `activation_clip`"


def ignored(skeleton: nn.Module, quantized: Mapping[str, Any]) -> list[str]:
    """Modules that hold a matrix and stay in floating point, but for embeddings, which the target does not mean."""
    named = skeleton.named_parameters(remove_duplicate=False)
    others = [path for path in (name.rpartition(".")[0] for name, p in named if p.dim() == 2) if path not in quantized]
    return list(dict.fromkeys(p for p in others if not isinstance(skeleton.get_submodule(p), nn.Embedding)))


def shards(
    directory: Path, settings: dict[str, Any], divisors: Mapping[str, Tensor]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The files of an artifact with each quantized linear as the format has it, one file in memory at a time.

    Args:
        directory: an artifact.
        settings: its quantization settings.
        divisors: `input_global_scale` by linear, of NVFP4 alone.
    """
    files, packed = index_tensors(directory, PROBE), settings["scheme"]["activations"] is None
    for file in sorted(set(files.values())):
        tensors: dict[str, Tensor] = {}
        for name in (name for name, path in files.items() if path == file):
            path, _, leaf = name.rpartition(".")
            if path not in settings["modules"] or leaf == "bias":
                tensors[name] = read_tensor(file, name)
            elif leaf == "qweight":
                dtype = read_tensor(files[f"{path}.scale"], f"{path}.scale").dtype
                found = stored(read_linear(path, settings, files, dtype).qtensor(), packed)
                found |= {"input_global_scale": divisors[path]} if path in divisors else {}
                tensors |= {f"{path}.{part}": tensor for part, tensor in found.items()}
        yield file.name, tensors


def compressed_tensors_parity(directory: Path, written: Path, scheme: Scheme) -> dict[str, float]:
    """How far transformers with the package is from the artifact, on the artifact's two probes.

    The package's steps of symmetric activations are max/7.5 or max/127.5, not max/7 or max/127, so where activations
    are rounded, two right answers differ by about as much as rounding them does.

    Args:
        directory: the artifact.
        written: the checkpoint.
        scheme: of both.

    Returns:
        reference: ‖difference‖ / ‖output‖, the larger of the two.
        activations: the yardstick, how far the artifact is from itself with floating-point activations.

    Raises:
        QuantizeError: rounding does not explain the difference.
    """
    probe = {name: x for name, x in read_all(directory / PROBE).items() if name != "output"}
    inputs = [dict(zip(probe, row, strict=True)) for row in zip(*(x.split(1) for x in probe.values()), strict=True)]
    model = load(directory)
    expected = first_outputs(model, inputs)
    found = {
        "reference": relative_error(outputs_of(written, inputs, scheme), expected),
        "activations": relative_error(
            first_outputs(copy_with_replaced_linears(model, with_float_activations), inputs), expected
        ),
    }
    allowed = ROUNDING * torch.finfo(running_type(scheme)).eps + 2 * found["activations"]
    if not found["reference"] <= allowed:  # NaN is caught too
        raise QuantizeError(
            f"transformers differs from the artifact by {found['reference']:.2g} of the output where rounding explains "
            f"{allowed:.2g} at most; report the model and the recipe"
        )
    return found


def outputs_of(directory: Path, inputs: list[dict[str, Tensor]], scheme: Scheme) -> list[Tensor]:
    """First outputs of a checkpoint as transformers loads it, in the type of `running_type`.

    Weights alone are unpacked as they are loaded: otherwise the package 0.20 expects zero points that are not packed.

    Raises:
        QuantizeError: it cannot be loaded.
    """
    cls = getattr(transformers, str(read_config(directory)["architectures"][0]))
    dtype, options = running_type(scheme), dict[str, Any]()
    if scheme.activations is None:
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    own = [{name: x.to(dtype) if x.is_floating_point() else x for name, x in feed.items()} for feed in inputs]
    with quiet():
        try:
            model = cls.from_pretrained(directory, dtype=dtype, local_files_only=True, **options)
        except Exception as error:  # whatever transformers and the package raise
            raise QuantizeError(f"transformers cannot load the checkpoint: {reason(error)}") from error
        return first_outputs(model.eval(), own)


def running_type(scheme: Scheme) -> torch.dtype:
    """What a checkpoint runs in: float32, or bfloat16, which is all that the package unpacks FP4 to."""
    return torch.bfloat16 if get_format(scheme.weights.format).element == "e2m1" else torch.float32
