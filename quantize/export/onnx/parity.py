"""The exported file and the quantized model both run on two inputs of each shape, and are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from quantize.errors import QuantizeError
from quantize.export.comparison import copy_with_replaced_linears, with_float_activations
from quantize.export.onnx.interface import Feed, Interface, Outputs

# Without VNNI, sums of two products of 8-bit integers saturate at 16 bits. With this option weights are unsigned there.
SESSION_CONFIG = {"session.x64quantprecision": "1"}
WITH_VNNI = {"session.x64quantprecision": "0"}  # 8-bit weights are up to 13 times as fast, and exact with VNNI
SEEDS = (1, 2)


def open_session(path: Path, entries: Mapping[str, str] = SESSION_CONFIG) -> onnxruntime.InferenceSession:
    """Open a file in ONNX Runtime on the CPU; with the default entries it is exact on every CPU."""
    options = onnxruntime.SessionOptions()
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def onnx_parity(
    interface: Interface, directory: Path, session_config: Mapping[str, str] = SESSION_CONFIG
) -> dict[str, float]:
    """Measure how far ONNX Runtime is from torch: ‖difference‖ / ‖output‖, the largest of all outputs and inputs.

    Args:
        interface: the interface of the exported model.
        directory: the directory of its files.
        session_config: the session options.

    Returns:
        emulation: the distance from torch running the same operators, rounding included.
        reference: the distance from the model, whose activation grids may differ from ONNX Runtime's.
        activations: how far the model is from itself with floating-point activations, for comparison.

    Raises:
        QuantizeError: the graph's output does not depend on its input.
    """
    pairs = [list(pair) for pair in zip(*(interface.feeds(seed).values() for seed in SEEDS), strict=True)]
    sessions = [open_session(directory / name, session_config) for name in interface.files()]
    outputs = [[interface.run_files(sessions, feed) for feed in pair] for pair in pairs]
    if any(np.array_equal(first[0], second[0]) for first, second in outputs):
        raise QuantizeError(
            f"the file in {directory} gives the same output for different inputs; report the model and the recipe"
        )
    feeds = [feed for pair in pairs for feed in pair]
    found, expected = [run for pair in outputs for run in pair], run_torch(interface, feeds)
    return {
        "emulation": relative_output_error(found, run_torch(interface.lowered(), feeds)),
        "reference": relative_output_error(found, expected),
        "activations": relative_output_error(
            run_torch(copy_with_replaced_linears(interface, with_float_activations), feeds), expected
        ),
    }


def run_torch(interface: Interface, feeds: Sequence[Feed]) -> list[Outputs]:
    """Return all outputs of a model for each feed."""
    with torch.no_grad():
        return [[output.numpy() for output in interface(feed)] for feed in feeds]


def relative_output_error(found: Sequence[Outputs], expected: Sequence[Outputs]) -> float:
    """Return the largest ‖y - target‖ / ‖target‖ of all outputs of all runs."""
    pairs = [pair for runs in zip(found, expected, strict=True) for pair in zip(*runs, strict=True)]
    norm = np.linalg.norm
    return max(float(norm(y - target) / norm(target)) for y, target in pairs)
