"""Functions of each channel by itself."""

from __future__ import annotations

from torch import fx

from quantize.graph.group import Group
from quantize.graph.labels import Walk
from quantize.graph.rules.table import arguments, name_of, pin_all, rule


@rule("relu", "relu_")
def relu(walk: Walk, node: fx.Node) -> None:
    """max(x, 0) commutes with positive factors."""
    labels = walk.labels[arguments(node)[0]]
    walk.restrict(labels, Group.POSITIVE_DIAGONAL, "`relu` commutes with positive factors only")
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
    "erf",
    "hardtanh",
    "clamp",
    "abs",
    "log",
    "rsqrt",
    "sqrt",
)
def nonlinear(walk: Walk, node: fx.Node) -> None:
    """A nonlinear function of each channel ends every symmetry."""
    pin_all(walk, node, f"the nonlinearity `{name_of(node)}` acts on each channel")
