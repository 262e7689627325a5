"""What an exported model is compared with: the quantized model, and how far its own rounding moves it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from quantize.nn.quantized_linear import QuantizedLinear
from quantize.scheme.scheme import Scheme

Module = TypeVar("Module", bound=nn.Module)


def copy_with_replaced_linears(model: Module, replace: Callable[[QuantizedLinear], nn.Module]) -> Module:
    """A copy that shares all weights, without KV cache, each `QuantizedLinear` replaced."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    twin = copy.deepcopy(model, shared)
    for name, layer in list(twin.named_modules()):
        if isinstance(layer, QuantizedLinear):
            twin.set_submodule(name, replace(layer))
    config: Any = getattr(twin, "config", None)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    return twin


def with_float_activations(layer: QuantizedLinear) -> QuantizedLinear:
    """Itself, without activation quantization; for `copy_with_replaced_linears`, whose layers are copies."""
    layer.scheme = Scheme(weights=layer.scheme.weights)
    return layer


@torch.no_grad()
def first_outputs(model: nn.Module, inputs: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """For each of the inputs the `logits` of a model that has them, otherwise its first output."""
    return [first_output(model(**feed)) for feed in inputs]


def first_output(outputs: Any) -> Tensor:
    """`logits` of what a model returned if there are any, else the first."""
    found: Tensor = outputs["logits"] if "logits" in outputs else outputs[0]
    return found


def relative_error(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """‖y - target‖ / ‖target‖, the largest of the pairs."""
    pairs = ((y.double(), target.double()) for y, target in zip(outputs, expected, strict=True))
    return max(float((y - target).norm() / target.norm()) for y, target in pairs)
