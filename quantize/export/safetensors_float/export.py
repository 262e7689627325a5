"""An artifact is exported as an ordinary checkpoint, with the values of its weights in floating point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from quantize.artifact.load import load
from quantize.artifact.writer import PROBE, ArtifactWriter, as_json
from quantize.checkpoint.key_mapping import as_stored
from quantize.checkpoint.tensor_files import index_tensors
from quantize.export.comparison import (
    copy_with_replaced_linears,
    first_outputs,
    relative_error,
    round_tables,
    with_float_activations,
)  # fmt: skip
from quantize.export.hf_checkpoint import check_difference, outputs_of, probe_inputs, shards
from quantize.export.outline import Outline
from quantize.export.safetensors_float.card import model_card
from quantize.export.safetensors_float.dequantize import (
    float_linear,
    float_stack,
    is_transposed,
    stack_with_noise,
    with_noise,
)  # fmt: skip
from quantize.formats import get_format
from quantize.nn.quantized_experts import QuantizedExperts
from quantize.nn.quantized_linear import QuantizedLinear


def export_safetensors_float(directory: Path, writer: ArtifactWriter, console: Console | None = None) -> dict[str, Any]:
    """Write shards, index, `config.json` and the model card, one shard in memory at a time; then compare.

    Weights are stored in the dtype that the float model's weights were stored in, under the names of its files.

    Args:
        directory: an artifact in which `obstacles` finds nothing.
        writer: an open writer; the caller writes the side files.
        console: the console that shows progress; None shows nothing.

    Returns:
        The entry `parity`: what `float_parity` measured.

    Raises:
        QuantizeError: a file is damaged, or transformers computes something else.
    """
    outline, dtypes = Outline.read(directory), set[torch.dtype]()

    def dequantized(path: str, linear: QuantizedLinear | QuantizedExperts) -> dict[str, Tensor]:
        is_fp4 = get_format(linear.scheme.weights.format).element == "e2m1"  # others have the model's dtype
        dtype = outline.dtype if is_fp4 else linear.scale.dtype
        dtypes.add(dtype)
        if isinstance(linear, QuantizedExperts):
            return {path: float_stack(linear, dtype)}
        place, (weight, bias) = outline.skeleton.get_submodule(path), float_linear(linear)
        found = {f"{path}.weight": (weight.T if is_transposed(place, linear.in_features) else weight).to(dtype)}
        # If the model has no bias, the linear's bias undoes a shift of its inputs, and folding leaves nothing of it.
        return found if bias is None or place.bias is None else found | {f"{path}.bias": bias.to(dtype)}

    total = len(set(index_tensors(directory, PROBE).values()))
    for number, (_, tensors) in enumerate(shards(directory, outline, dequantized, console), 1):
        writer.add(f"model-{number:05}-of-{total:05}.safetensors", as_stored(outline.skeleton, tensors))
    writer.write_index()
    config = {name: value for name, value in outline.config.items() if name != "quantization_config"}
    writer.write("config.json", as_json(config))
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
    parity = float_parity(directory, writer.directory, coarsest)
    writer.write("README.md", model_card(directory, outline, dtypes, parity))
    return {"parity": parity}


def float_parity(directory: Path, written: Path, dtype: torch.dtype) -> dict[str, float]:
    """Measure how far the checkpoint is from the artifact with activations in floating point, on its two probes.

    Both run in float32, so they differ only by the dtype in which weights are stored, which moves each weight by at
    most eps / 2 of itself.

    Args:
        directory: the artifact.
        written: the checkpoint.
        dtype: the dtype in which weights are stored.

    Returns:
        reference: ‖difference‖ / ‖output‖, the larger one of the two probes.
        rounding: how far the artifact is from itself with random errors of this size in its weights, for comparison.
        activations: how far the artifact is from itself with rounded activations, which the checkpoint leaves out.

    Raises:
        QuantizeError: the checkpoint cannot be loaded, or random errors do not explain the difference.
    """
    inputs, model = probe_inputs(directory), load(directory, engine="reference")
    round_tables(model, dtype)
    rounded = first_outputs(model, inputs)
    expected = first_outputs(copy_with_replaced_linears(model, with_float_activations, with_float_activations), inputs)
    largest = torch.finfo(dtype).eps / 2
    noisy = copy_with_replaced_linears(
        model, lambda linear: with_noise(linear, largest), lambda experts: stack_with_noise(experts, largest)
    )
    found = {
        "reference": relative_error(outputs_of(written, inputs), expected),
        "rounding": relative_error(first_outputs(noisy, inputs), expected),
        "activations": relative_error(rounded, expected),
    }
    check_difference(found["reference"], torch.finfo(torch.float32).eps, found["rounding"], expected)
    return found
