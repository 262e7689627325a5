"""These operators are functions of each channel by itself."""

from __future__ import annotations

from torch import fx

from quantize.graph.allowed_transforms import AllowedTransforms
from quantize.graph.labels import ChannelTrace
from quantize.graph.rules.table import arguments, name_of, pin_all, rule


@rule("relu", "relu_", "leaky_relu", "abs")
def positive(walk: ChannelTrace, node: fx.Node) -> None:
    """Functions with f(d x) = d f(x) for d > 0 admit positive factors."""
    labels = walk.labels.get(arguments(node)[0])
    if labels is None:
        return pin_all(walk, node, f"`{name_of(node)}` acts on its square or mean")
    walk.restrict(labels, AllowedTransforms.POSITIVE_DIAGONAL, f"`{name_of(node)}` commutes with positive factors only")
    walk.labels[node] = labels


@rule(
    "silu",
    "gelu",
    "tanh",
    "sigmoid",
    "exp",
    "softmax",
    "_softmax",
    "softplus",
    "mish",
    "elu",
    "hardswish",
    "erf",
    "hardtanh",
    "clamp",
    "log",
    "rsqrt",
    "sqrt",
)
def nonlinear(walk: ChannelTrace, node: fx.Node) -> None:
    """Other nonlinear functions of each channel admit no transform."""
    pin_all(walk, node, f"the nonlinearity `{name_of(node)}` acts on each channel")
