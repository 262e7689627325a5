"""Sums and products: channels meet, or scale one another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from quantize.graph.group import Group
from quantize.graph.labels import Event, Walk, axis_index, channel_axes, last_axis, shape_of
from quantize.graph.rules.movement import origin
from quantize.graph.rules.norms import squared
from quantize.graph.rules.table import arguments, name_of, pin_all, rule
from quantize.graph.rules.weights import gain


@rule("add", "add_", "sub")
def added(walk: Walk, node: fx.Node) -> None:
    """Residual sums make two channels one; a parameter added writes; anything else that is added pins."""
    x, y = arguments(node)[:2]
    known = [n for n in (x, y) if n in walk.labels]
    if any(n in walk.squares for n in (x, y)):
        return pin_all(walk, node, "its square is added to something")
    if len(known) == 2:
        return join(walk, node, walk.labels[x], walk.labels[y])
    other = y if known[0] is x else x
    labels, name = walk.labels[known[0]], walk.parameter(other)
    ids = last_axis(labels)
    if name is None or ids is None or shape_of(other)[-1] != len(ids):
        return walk.pin(known[0], "something that no weight writes is added to it")
    walk.events.append(Event(ids, parameter=name, axis=len(shape_of(other)) - 1))
    walk.labels[node] = labels.expand(shape_of(node))


def join(walk: Walk, node: fx.Node, a: Tensor, b: Tensor) -> None:
    """The channels of two summands are the same channels."""
    a, b = torch.broadcast_tensors(a, b)
    walk.joined.append(torch.stack([a.reshape(-1), b.reshape(-1)]).unique(dim=1))
    walk.labels[node] = a


@rule("mul", "mul_", "div")
def scaled(walk: Walk, node: fx.Node) -> None:
    """A number or a factor for each token changes nothing; a factor for each channel commutes with diagonals only."""
    x, y = arguments(node)[:2]
    if x is y and x in walk.labels and name_of(node) == "mul":
        return squared(walk, node)
    if any(n in walk.squares for n in (x, y)):
        return pin_all(walk, node, "its square is scaled")
    if y in walk.labels and (x in walk.labels or name_of(node) == "div"):
        walk.pin(x if x in walk.labels else y, f"`{name_of(node)}` combines it with other channels")
        if name_of(node) == "div":
            return walk.pin(y, "something is divided by it")
    known, other = (y, x) if y in walk.labels else (x, y)
    scale(walk, node, known, other)


def scale(walk: Walk, node: fx.Node, known: fx.Node, other: Any) -> None:
    """`known` has channels and `other` multiplies it."""
    labels = walk.labels[known]
    if not isinstance(other, fx.Node) or not hasattr(other.meta["val"], "shape"):
        walk.labels[node] = labels
    elif (name := walk.parameter(other)) and shape_of(other) == labels.shape[-1:]:
        gain(walk, node, known, name)
    else:
        factor(walk, node, labels, other)


def factor(walk: Walk, node: fx.Node, labels: Tensor, other: fx.Node) -> None:
    """A computed factor: harmless where it is one number for all channels of a block."""
    labels = labels.expand(shape_of(node))
    size = (1,) * (labels.dim() - len(shape_of(other))) + shape_of(other)
    varying = [d for d in channel_axes(labels) if size[d] != 1]
    if varying == [1] and labels.dim() == 4:
        walk.restrict(labels, Group.LINEAR, "", blocks=axis_index(labels, 1))
    elif varying:
        walk.restrict(labels, Group.DIAGONAL, f"{origin(other)} scales its channels one by one")
    walk.labels[node] = labels
