"""A GGUF file is read back: its weights are compared with the artifact's, and what transformers computes of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, ReaderTensor, dequantize
from torch import Tensor, nn

from quantize.artifact.load import load
from quantize.errors import QuantizeError
from quantize.export.comparison import (
    copy_with_replaced_linears,
    first_outputs,
    relative_error,
    with_float_activations,
)  # fmt: skip
from quantize.export.gguf.tensors import HEAD, WORDS, gguf_name, name_map, row_order
from quantize.export.hf_checkpoint import check_difference, outputs_of, probe_inputs
from quantize.export.outline import Outline
from quantize.formats.qtensor import QTensor
from quantize.nn.quantized_embedding import QuantizedEmbedding, table_of
from quantize.nn.quantized_linear import QuantizedLinear

LARGEST_STEP = 1 / 16  # of a matrix's largest step, by which rounding its scales to float16 may move a weight


def gguf_parity(directory: Path, path: Path, outline: Outline) -> dict[str, Any]:
    """Measure how far a file is from the artifact with activations in floating point, on its two probes.

    Args:
        directory: the artifact.
        path: the file.
        outline: the artifact's outline.

    Returns:
        steps: how far scales that are no float16 move a weight, in steps of its matrix; 0 if all scales are.
        reference: ‖difference‖ / ‖output‖ of the file's model in transformers and the artifact with the file's weights,
            the larger one of the two probes. `not compared` for NVFP4, of which transformers leaves a scale out.
        activations: how far the artifact is from itself with rounded activations, which the file leaves out.

    Raises:
        QuantizeError: the file cannot be loaded, or holds other weights, or transformers computes something else.
    """
    inputs, model = probe_inputs(directory), load(directory, engine="reference")
    rounded = first_outputs(model, inputs)
    activations = relative_error(
        first_outputs(copy_with_replaced_linears(model, with_float_activations), inputs), rounded
    )
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    steps = max(take_weights(model, stored, outline.model_config()), default=0.0)
    check_steps(steps)
    if any(name.endswith(".scale") for name in stored):
        return {"steps": steps, "reference": "not compared", "activations": activations}
    settings = {name: x for name, x in outline.model_config().items() if name != "quantization_config"}
    own: Any = outline.skeleton.config
    config = type(own).from_dict(settings)
    config.tie_word_embeddings = HEAD not in stored
    found = outputs_of(path.parent, inputs, gguf_file=path.name, config=config)
    expected = first_outputs(model, inputs)
    reference = relative_error(found, expected)
    check_difference(reference, torch.finfo(torch.float32).eps, 0.0, expected)
    return {"steps": steps, "reference": reference, "activations": activations}


def check_steps(steps: float) -> None:
    """Check how many steps a file's weights are from an artifact's.

    Raises:
        QuantizeError: scales in float16 do not explain it.
    """
    if not steps <= LARGEST_STEP:
        raise QuantizeError(
            f"the file's weights are {steps:.2g} steps from the artifact's, and at most {LARGEST_STEP:.2g} come of "
            'scales in float16; quantize with `scale_dtype = "float16"` in [weights]'
        )


def take_weights(model: nn.Module, stored: Mapping[str, ReaderTensor], config: Mapping[str, Any]) -> list[float]:
    """Put a file's weights in the place of a model's quantized ones, and return how many steps each moved at most."""
    names, steps = name_map(config), list[float]()
    for path, module in list(model.named_modules()):
        if not isinstance(module, QuantizedLinear | QuantizedEmbedding):
            continue
        own = module.qtensor() if isinstance(module, QuantizedLinear) else table_of(module.qweight, module.scale)
        found = gguf_name(names, f"{path}.weight")
        weight = read(stored, found if found in stored else WORDS, row_order(path, len(own.data), config))
        steps.append(moved(weight, own))
        parameter = nn.Parameter(weight, requires_grad=False)
        if isinstance(module, QuantizedEmbedding):
            module.dequantize(torch.float32)
            module.register_parameter("weight", parameter)
        else:
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight = parameter
            if module.bias is not None:
                linear.bias = nn.Parameter(module.bias.float(), requires_grad=False)
            model.set_submodule(path, linear)
    return steps


def moved(weight: Tensor, own: QTensor) -> float:
    """Return the largest distance of a weight [N, K] from an artifact's, in steps of the artifact's largest scale."""
    return float((weight - own.dequantize()).abs().max() / own.unpack_scale().float().max())


def read(stored: Mapping[str, ReaderTensor], name: str, order: Tensor | None) -> Tensor:
    """Return a matrix of a file, float32 [N, K], in the artifact's order of rows."""
    tensor = stored[name]
    found = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
    scale = stored.get(f"{name.removesuffix('.weight')}.scale")
    if scale is not None:
        found = found * float(scale.data[0])
    return in_model_order(found, order)


def in_model_order(found: Tensor, order: Tensor | None) -> Tensor:
    """Return a matrix of a file, whose rows are in an order (`row_order`), with them in the model's."""
    if order is None:
        return found
    back = torch.empty_like(found)
    back[order] = found
    return back
