"""The kurtosis of what reaches the quantizers, and what it costs to flatten the tails while a model runs."""

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
    """Return the kurtosis of what each linear quantizes, over the channels of a token and averaged over tokens.

    Args:
        model: the quantized model, or the float model that it was made of.
        inputs: arguments of `forward`.
        paths: the paths of the linears, which are in both models.
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
    """Return a table of the kurtosis of linears' inputs before and after, one row for those that read the same basis.

    Args:
        model: the quantized model.
        reference: the float model.
        inputs: arguments of `forward`.
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
    """Return a linear's input as its quantizer sees it."""
    return smoothed(module.transform(x), module.scheme.activations) if isinstance(module, QuantizedLinear) else x


def online_cost(model: nn.Module) -> float:
    """Return the multiply-adds of online transforms and runtime smooth per token, as a part of the linears' own."""
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    extra = sum(transform.cost(layer.in_features) for layer in layers for transform in layer.online)
    extra += sum(smooth_cost(layer) for layer in layers)
    return float(extra / max(1, sum(layer.in_features * layer.out_features for layer in layers)))


def smooth_cost(layer: QuantizedLinear) -> int:
    """Return a division for each channel and a multiplication for each output and group."""
    args = layer.scheme.activations
    if args is None or args.runtime_smooth is None:
        return 0
    return layer.in_features + layer.out_features * -(-layer.in_features // args.runtime_smooth.group_size)
