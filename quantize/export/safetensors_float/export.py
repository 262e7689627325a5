"""An artifact as an ordinary checkpoint: the values that its weights have, with no trace of how they are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantize.artifact.load import load
from quantize.artifact.writer import PROBE, ArtifactWriter, as_json
from quantize.checkpoint.key_mapping import as_stored
from quantize.checkpoint.tensor_files import index_tensors
from quantize.export.comparison import copy_with_replaced_linears, first_outputs, relative_error, with_float_activations
from quantize.export.hf_checkpoint import ROUNDING, check_difference, outputs_of, probe_inputs, shards
from quantize.export.outline import Outline
from quantize.export.safetensors_float.card import model_card
from quantize.export.safetensors_float.dequantize import float_linear, is_transposed, with_noise
from quantize.formats import get_format
from quantize.nn.quantized_linear import QuantizedLinear


def export_safetensors_float(directory: Path, writer: ArtifactWriter) -> dict[str, Any]:
    """Write shards, index, `config.json` and the model card, one shard in memory at a time; then compare.

    Weights are stored in the type that the float model's were stored in, under the names of its files.

    Args:
        directory: an artifact that `obstacles` finds nothing in.
        writer: open; what else belongs to a model is the caller's.

    Returns:
        `parity`: what `float_parity` measured.

    Raises:
        QuantizeError: damaged files, or transformers computes something else.
    """
    outline, dtypes = Outline.read(directory), set[torch.dtype]()

    def dequantized(path: str, linear: QuantizedLinear) -> dict[str, Tensor]:
        place = outline.skeleton.get_submodule(path)
        is_fp4 = get_format(linear.scheme.weights.format).element == "e2m1"  # scales of others have the model's type
        dtype = outline.dtype if is_fp4 else linear.scale.dtype
        dtypes.add(dtype)
        weight, bias = float_linear(linear)
        found = {"weight": (weight.T if is_transposed(place, linear.in_features) else weight).to(dtype)}
        # Where the model has no bias, that of the linear takes a shift of its inputs back, and nothing is left of it.
        return found if bias is None or place.bias is None else found | {"bias": bias.to(dtype)}

    total = len(set(index_tensors(directory, PROBE).values()))
    for number, (_, tensors) in enumerate(shards(directory, outline, dequantized), 1):
        writer.add(f"model-{number:05}-of-{total:05}.safetensors", as_stored(outline.skeleton, tensors))
    writer.write_index()
    config = {name: value for name, value in outline.config.items() if name != "quantization_config"}
    writer.write("config.json", as_json(config))
    parity = float_parity(directory, writer.directory, max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0))
    writer.write("README.md", model_card(directory, outline, dtypes, parity))
    return {"parity": parity}


def float_parity(directory: Path, written: Path, eps: float) -> dict[str, float]:
    """How far the checkpoint is from the artifact with activations in floating point, on the artifact's two probes.

    Both run in float32, so that what differs is the type that the weights are stored in, by which each of them is off
    by eps / 2 of itself at most.

    Args:
        directory: the artifact.
        written: the checkpoint.
        eps: of the type that weights are stored in.

    Returns:
        reference: ‖difference‖ / ‖output‖, the larger of the two.
        rounding: the yardstick, how far the artifact is from itself with weights that are off by as much at random.
        activations: what the checkpoint leaves out, how far the artifact is from itself with rounded activations.

    Raises:
        QuantizeError: it cannot be loaded, or the yardstick does not explain the difference.
    """
    inputs, model = probe_inputs(directory), load(directory)
    rounded = first_outputs(model, inputs)
    expected = first_outputs(copy_with_replaced_linears(model, with_float_activations), inputs)
    noisy = copy_with_replaced_linears(model, lambda linear: with_noise(linear, eps / 2))
    found = {
        "reference": relative_error(outputs_of(written, inputs), expected),
        "rounding": relative_error(first_outputs(noisy, inputs), expected),
        "activations": relative_error(rounded, expected),
    }
    check_difference(found["reference"], ROUNDING * torch.finfo(torch.float32).eps + 2 * found["rounding"])
    return found
