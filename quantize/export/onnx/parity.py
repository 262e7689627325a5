"""The exported file and the quantized model run on two inputs of each shape and on real text, and are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from quantize.calibration.logits import Divergence, divergence
from quantize.errors import QuantizeError
from quantize.export.comparison import copy_with_replaced_linears, with_float_activations
from quantize.export.onnx.interface import Feed, Interface, Outputs
from quantize.pipeline.progress import Begin

# Without VNNI, sums of two products of 8-bit integers saturate at 16 bits. With this option weights are unsigned there.
SESSION_CONFIG = {"session.x64quantprecision": "1"}
WITH_VNNI = {"session.x64quantprecision": "0"}  # 8-bit weights are up to 13 times as fast, and exact with VNNI
SEEDS = (1, 2)
IN_ONNX_RUNTIME, IN_TORCH, ARTIFACT = (
    "running in ONNX Runtime",
    "running its operators in torch",
    "running the artifact",
)
FLOAT, ON_TEXT = "running the artifact with float activations", "comparing the tokens of real text"


def open_session(path: Path, entries: Mapping[str, str] = SESSION_CONFIG) -> onnxruntime.InferenceSession:
    """Open a file in ONNX Runtime on the CPU; with the default entries it is exact on every CPU."""
    options = onnxruntime.SessionOptions()
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def onnx_parity(
    interface: Interface,
    directory: Path,
    session_config: Mapping[str, str] = SESSION_CONFIG,
    real: Sequence[Feed] = (),
    begin: Begin = lambda _: None,
) -> dict[str, float]:
    """Measure how far ONNX Runtime is from torch: ‖difference‖ / ‖output‖, the largest of all outputs and inputs.

    Args:
        interface: the interface of the exported model.
        directory: the directory of its files.
        session_config: the session options.
        real: real inputs of a model that scores tokens.
        begin: is told each of `parity_steps` as it begins.

    Returns:
        kl: with real inputs, Σ p log(p/q) in nats a token, where p is the model's distribution and q the file's.
        top1: with real inputs, the part of the tokens for which both rank the same token first.
        emulation: the distance from torch running the same operators, rounding included.
        reference: the distance from the model, whose activation grids may differ from ONNX Runtime's.
        activations: how far the model is from itself with floating-point activations, for comparison.

    Raises:
        QuantizeError: the graph's output does not depend on its input.
    """
    pairs = [list(pair) for pair in zip(*(interface.feeds(seed).values() for seed in SEEDS), strict=True)]
    begin(IN_ONNX_RUNTIME)
    sessions = [open_session(directory / name, session_config) for name in interface.files()]
    outputs = [[interface.run_files(sessions, feed) for feed in pair] for pair in pairs]
    if any(np.array_equal(first[0], second[0]) for first, second in outputs):
        raise QuantizeError(
            "the ONNX file gives the same output for different inputs; run the artifact with quantize.load, and report "
            "the model and the recipe"
        )
    feeds = [feed for pair in pairs for feed in pair]
    found = [run for pair in outputs for run in pair]
    begin(IN_TORCH)
    emulated = run_torch(interface.lowered(), feeds)
    begin(ARTIFACT)
    expected = run_torch(interface, feeds)
    begin(FLOAT)
    exact = run_torch(copy_with_replaced_linears(interface, with_float_activations, with_float_activations), feeds)
    differences = {
        "emulation": relative_output_error(found, emulated),
        "reference": relative_output_error(found, expected),
        "activations": relative_output_error(exact, expected),
    }
    if not real:
        return differences
    begin(ON_TEXT)
    return token_parity(interface, sessions, real) | differences


def parity_steps(real: Sequence[Feed]) -> list[str]:
    """Return the names of the steps of `onnx_parity`."""
    return [IN_ONNX_RUNTIME, IN_TORCH, ARTIFACT, FLOAT, *[ON_TEXT] * bool(real)]


@torch.no_grad()
def token_parity(
    interface: Interface, sessions: Sequence[onnxruntime.InferenceSession], real: Sequence[Feed]
) -> dict[str, float]:
    """Return `kl` and `top1` of `onnx_parity`, the means over all tokens of real inputs that have a next one."""
    place, total = list(interface.outputs).index("logits"), Divergence()
    for feed in real:
        tokens = feed["decoder_input_ids" if "decoder_input_ids" in feed else "input_ids"]
        logits = torch.from_numpy(interface.run_files(sessions, feed)[place])
        total += divergence(logits[0, :-1], interface(feed)[place][0, :-1], tokens[0, 1:])
    return {"kl": total.mean("kl"), "top1": total.mean("top1")}


def run_torch(interface: Interface, feeds: Sequence[Feed]) -> list[Outputs]:
    """Return all outputs of a model for each feed."""
    with torch.no_grad():
        return [[output.numpy() for output in interface(feed)] for feed in feeds]


def relative_output_error(found: Sequence[Outputs], expected: Sequence[Outputs]) -> float:
    """Return the largest ‖y - target‖ / ‖target‖ of all outputs of all runs."""
    pairs = [pair for runs in zip(found, expected, strict=True) for pair in zip(*runs, strict=True)]
    norm = np.linalg.norm
    return max(float(norm(y - target) / norm(target)) for y, target in pairs)
