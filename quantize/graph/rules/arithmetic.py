"""In sums and products channels meet or scale one another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx

from quantize.graph.allowed_transforms import AllowedTransforms
from quantize.graph.labels import ChannelTrace, axis_index, channel_axes, id_pairs, last_axis, shape_of, trimmed
from quantize.graph.rules.movement import as_value, origin
from quantize.graph.rules.norms import mean_square, squared
from quantize.graph.rules.table import SOURCES, arguments, name_of, pin_all, rule
from quantize.graph.rules.weights import gain
from quantize.graph.views import View


@rule("add", "add_", "sub", "sub_", operands=2, kind=SOURCES)
def added(walk: ChannelTrace, node: fx.Node) -> None:
    """A residual sum makes two channels one, a parameter that is added writes them, and anything else pins them."""
    x, y = arguments(node)[:2]
    if offset_gain(walk, node, x, y) or not any(isinstance(n, fx.Node) and walk.touches(n) for n in (x, y)):
        return
    if x in walk.labels and y in walk.means and name_of(node) == "sub":
        return centred(walk, node, x, y)
    if any(n in walk.squares or n in walk.means for n in (x, y)):
        return pin_all(walk, node, "its square or mean is added to something")
    a, b = as_value(walk, x), as_value(walk, y)
    if a is not None and b is not None:
        return join(walk, node, a, b)
    known, other = (x, y) if b is None else (y, x)
    what = f"{origin(other)}, which no weight writes," if isinstance(other, fx.Node) else "a number"
    walk.pin(known, f"{what} is added to it")
    walk.labels[node] = walk.labels[known].expand(shape_of(node))


def offset_gain(walk: ChannelTrace, node: fx.Node, x: Any, y: Any) -> bool:
    """Return whether the sum is a parameter plus a number, such as the gain 1 + w."""
    view, number = (walk.view(x), y) if walk.view(x) else (walk.view(y), x)
    if view is None or not isinstance(number, int | float) or name_of(node) != "add" or node.kwargs:
        return False
    walk.views[node] = replace(view, offset=view.offset + number)
    return True


def centred(walk: ChannelTrace, node: fx.Node, x: fx.Node, mean: fx.Node) -> None:
    """The mean over the channels is subtracted."""
    labels = walk.labels[x]
    if walk.means[mean] is not labels:
        return pin_all(walk, node, "the mean of other channels is subtracted from it")
    reduced = [d for d, (n, m) in enumerate(zip(shape_of(x), shape_of(mean), strict=True)) if m != n]
    mean_square(walk, labels, reduced, AllowedTransforms.CENTRED_ORTHOGONAL)
    walk.labels[node] = labels


@rule("masked_scatter", operands=3)
def scattered(walk: ChannelTrace, node: fx.Node) -> None:
    """Rows that take the place of tokens carry the channels of what they replace, if whole rows are chosen."""
    x, mask, source = arguments(node)[:3]
    parts = [last_axis(labels) for n in (x, source) if (labels := as_value(walk, n)) is not None]
    if len(parts) < 2 or any(ids is None or len(ids) != shape_of(node)[-1] for ids in parts) or not whole_rows(mask):
        return pin_all(walk, node, "`masked_scatter` puts other values in its place")
    a, b = (ids.expand(shape_of(node)) for ids in parts if ids is not None)
    join(walk, node, a, b)


def whole_rows(mask: fx.Node) -> bool:
    """Return whether a mask is the same along its last axis, as a mask of tokens that was expanded is."""
    while name_of(mask) in ("to", "_to_copy", "clone", "alias"):
        mask = mask.all_input_nodes[0]
    tokens = mask.all_input_nodes[0] if name_of(mask) in ("expand", "expand_as") else mask
    return shape_of(tokens)[-1:] == (1,)


def join(walk: ChannelTrace, node: fx.Node, a: Tensor, b: Tensor) -> None:
    """The channels of two summands are the same channels."""
    a, b = torch.broadcast_tensors(a, b)
    walk.labels[node] = a if len(channel_axes(a)) <= len(channel_axes(b)) else b
    walk.joined.append(id_pairs(*trimmed(a, b)))


@rule("mul", "mul_", "div", "div_", operands=2, kind=SOURCES)
def scaled(walk: ChannelTrace, node: fx.Node) -> None:
    """A number or a factor for each token changes nothing; a factor for each channel commutes with diagonals only."""
    x, y = arguments(node)[:2]
    if x is y and x in walk.labels and name_of(node) == "mul":
        return squared(walk, node)
    if not any(isinstance(n, fx.Node) and walk.touches(n) for n in (x, y)):
        return scale_unknown(walk, node, x, y)
    if any(n in walk.squares or n in walk.means for n in (x, y)):
        return pin_all(walk, node, "its square or mean is scaled")
    if y in walk.labels and (x in walk.labels or name_of(node).startswith("div")):
        walk.pin(x if x in walk.labels else y, f"`{name_of(node)}` combines it with other channels")
        if name_of(node).startswith("div"):
            return walk.pin(y, "something is divided by it")
    known, other = (y, x) if y in walk.labels else (x, y)
    scale(walk, node, known, other)


def scale_unknown(walk: ChannelTrace, node: fx.Node, x: Any, y: Any) -> None:
    """A gain that scales a value without channels writes new ones; other products without channels have no effect."""
    view, other = (walk.view(x), y) if walk.view(x) else (walk.view(y), x)
    if isinstance(other, fx.Node) and walk.view(other) is None and is_gain(view, node):
        gain(walk, node, None, view)


def is_gain(view: View | None, node: fx.Node) -> TypeGuard[View]:
    """Return whether a parameter holds one factor for each index of the last axis of a product."""
    if view is None or not view.size or name_of(node) != "mul":
        return False
    return max(view.size) == view.size[-1] == shape_of(node)[-1] > 1


def scale(walk: ChannelTrace, node: fx.Node, known: fx.Node, other: Any) -> None:
    """Treat a product of `known`, which has channels, and `other`."""
    labels, view = walk.labels[known], walk.view(other)
    if not isinstance(other, fx.Node) or not hasattr(other.meta["val"], "shape"):
        walk.labels[node] = labels
    elif is_gain(view, node) and labels.shape[-1] == view.size[-1]:
        gain(walk, node, labels, view)
    else:
        factor(walk, node, labels, other)


def factor(walk: ChannelTrace, node: fx.Node, labels: Tensor, other: fx.Node) -> None:
    """Treat a computed factor, which restricts nothing if it is one number for all channels of a block."""
    labels = labels.expand(shape_of(node))
    size = (1,) * (labels.dim() - len(shape_of(other))) + shape_of(other)
    axes = channel_axes(labels)
    apart = [d for d in axes if size[d] != 1]
    if apart and apart == axes:
        walk.restrict(labels, AllowedTransforms.DIAGONAL, f"{origin(other)} scales its channels one by one")
    elif apart:
        walk.restrict(labels, AllowedTransforms.LINEAR, "", blocks=axis_index(labels, apart))
    walk.labels[node] = labels
