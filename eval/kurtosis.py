"""How heavy the tails of what reaches the quantizers are, and what flattening them costs while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from quantize.formats.fake_quantize import smoothed
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.transforms.kurtosis import kurtosis


@torch.no_grad()
def input_kurtosis(model: nn.Module, inputs: Mapping[str, Tensor], paths: list[str]) -> dict[str, float]:
    """Kurtosis over the channels of a token, averaged over tokens, of what each linear quantizes.

    Args:
        model: quantized, or the float model it was made of.
        inputs: arguments of forward.
        paths: of linears in both.
    """
    found: dict[str, float] = {}

    def note(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            x = seen(module, given[0].float())
            found[path] = float(kurtosis(x.flatten(0, -2).double()).mean())

        return hook

    hooks = [model.get_submodule(path).register_forward_pre_hook(note(path)) for path in paths]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def kurtosis_table(
    model: nn.Module, reference: nn.Module, inputs: Mapping[str, Tensor], modules: Mapping[str, Any]
) -> Table:
    """One row for the linears that read the same basis: the kurtosis of their input in the float model, and now.

    Args:
        model: quantized.
        reference: the float model.
        inputs: arguments of forward.
        modules: the artifact's quantized linears by path.
    """
    before, after = (input_kurtosis(m, inputs, list(modules)) for m in (reference, model))
    rows: dict[tuple[float, float], list[str]] = {}
    for path in modules:
        rows.setdefault((before[path], after[path]), []).append(path)
    table = Table("input of", "kurtosis before", "after")
    for (old, new), paths in rows.items():
        ends = ", ".join(path.rpartition(".")[2] for path in paths[1:])
        table.add_row(", ".join([paths[0], *([ends] if ends else [])]), f"{old:.1f}", f"{new:.1f}")
    return table


def seen(module: nn.Module, x: Tensor) -> Tensor:
    """What a linear's quantizer sees of its input."""
    return smoothed(module.transform(x), module.scheme.activations) if isinstance(module, QuantizedLinear) else x


def online_cost(model: nn.Module) -> float:
    """Multiply-adds that online transforms and runtime smooth add for each token, as a part of those of the linears."""
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    extra = sum(transform.cost(layer.in_features) for layer in layers for transform in layer.online)
    extra += sum(smooth_cost(layer) for layer in layers)
    return float(extra / max(1, sum(layer.in_features * layer.out_features for layer in layers)))


def smooth_cost(layer: QuantizedLinear) -> int:
    """A division for each channel, a multiplication for each output and group."""
    args = layer.scheme.activations
    if args is None or args.runtime_smooth is None:
        return 0
    return layer.in_features + layer.out_features * -(-layer.in_features // args.runtime_smooth.group_size)
