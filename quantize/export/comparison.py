"""An exported model is compared with the quantized model, and with how far rounding moves the quantized model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from quantize.errors import QuantizeError
from quantize.nn.quantized_embedding import QuantizedEmbedding
from quantize.nn.quantized_experts import QuantizedExperts, replace_parameter
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.nn.quantized_weight import QuantizedWeight
from quantize.scheme.scheme import Scheme

Module = TypeVar("Module", bound=nn.Module)
Weight = TypeVar("Weight", bound=QuantizedWeight)


def copy_with_replaced_linears(
    model: Module,
    replace: Callable[[QuantizedLinear], nn.Module],
    replace_experts: Callable[[QuantizedExperts], nn.Module | nn.Parameter] = lambda experts: experts,
) -> Module:
    """Return a copy that shares all weights, without KV cache, in which each `QuantizedLinear` is replaced.

    Stacks of experts are replaced as well, where `replace_experts` is given, be it by a parameter in floating point.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    twin = copy.deepcopy(model, shared)
    for name, layer in list(twin.named_modules()):
        if isinstance(layer, QuantizedLinear):
            twin.set_submodule(name, replace(layer))
        elif isinstance(layer, QuantizedExperts):
            replace_parameter(twin, name, replace_experts(layer))
    config: Any = getattr(twin, "config", None)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    return twin


def with_float_activations(layer: Weight) -> Weight:
    """Turn off a layer's activation quantization, in place; for `copy_with_replaced_linears`, which copies layers."""
    layer.scheme = Scheme(weights=layer.scheme.weights)
    return layer


def as_float(layer: QuantizedLinear, dtype: torch.dtype) -> nn.Linear:
    """Return a linear without online transforms as a float32 `nn.Linear`, its weight rounded to `dtype`."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    linear.weight = nn.Parameter(layer.qtensor().dequantize().to(dtype).float(), requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.float(), requires_grad=False)
    return linear


def as_float_stack(experts: QuantizedExperts, dtype: torch.dtype) -> nn.Parameter:
    """Return a stack without online transforms as the float32 parameter that it was, rounded to `dtype`."""
    W = torch.stack([experts.expert(e).qtensor().dequantize().to(dtype).float() for e in range(experts.count)])
    return nn.Parameter(W.mT if experts.transposed else W, requires_grad=False)


def round_tables(model: nn.Module, dtype: torch.dtype) -> None:
    """Round tables of words in 8 bits, in place, to the `dtype` in which a checkpoint of floats holds them."""
    for module in model.modules():
        if isinstance(module, QuantizedEmbedding):
            module.dequantize(dtype)


@torch.no_grad()
def first_outputs(model: nn.Module, inputs: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """Return for each of the inputs the `logits` of a model that has them, otherwise its first output.

    Raises:
        QuantizeError: the model does not take the inputs, which come from a file of the artifact.
    """
    try:
        return [first_output(model(**feed)) for feed in inputs]
    except Exception as error:  # code of other authors may raise anything
        what = ", ".join(f"{name} {list(x.shape)} of {x.dtype}" for feed in inputs[:1] for name, x in feed.items())
        raise QuantizeError(
            f"the model does not run on the artifact's probe, which is {what}; check it with quantize-model verify"
        ) from error


def first_output(outputs: Any) -> Tensor:
    """Return the `logits` of a model's outputs if there are any, otherwise the first output."""
    found: Tensor = outputs["logits"] if "logits" in outputs else outputs[0]
    return found


def relative_error(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest ‖y - target‖ / ‖target‖ of the pairs."""
    pairs = ((y.double(), target.double()) for y, target in zip(outputs, expected, strict=True))
    return max(float((y - target).norm() / target.norm()) for y, target in pairs)
