"""Where operators move elements and change none, channels go where their elements go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from quantize.graph.labels import ChannelTrace, concrete, last_axis, move, shape_of
from quantize.graph.rules.table import RULES, SOURCES, TRANSPARENT, arguments, name_of, pin_all, rule
from quantize.graph.views import View, as_view


@rule(
    "view",
    "_unsafe_view",
    "reshape",
    "transpose",
    "permute",
    "t",
    "unsqueeze",
    "squeeze",
    "expand",
    "slice",
    "select",
    "split",
    "split_with_sizes",
    "chunk",
    "unbind",
    "repeat",
    "repeat_interleave",
    "narrow",
    "flatten",
    "unflatten",
    "movedim",
    "roll",
    "flip",
    "getitem",
    kind=TRANSPARENT,
)
def moved(walk: ChannelTrace, node: fx.Node) -> None:
    """Channels go where the operator moves their elements."""
    first = node.all_input_nodes[0]
    if first in walk.squares or first in walk.means:
        return pin_all(walk, node, f"its square or mean passes through `{name_of(node)}`")
    if first in walk.labels:
        walk.labels[node] = move(walk, node)
    elif first in walk.views:
        move_view(walk, node)


def move_view(walk: ChannelTrace, node: fx.Node) -> None:
    """A parameter that is taken apart or turned around is still seen as that parameter."""
    source = node.all_input_nodes[0]
    view = walk.views[source]
    if name_of(node) == "getitem":
        walk.views[node] = view[arguments(node)[1]]
        return
    base = view.stand_in()
    args = map_arg(node.args, lambda n: base if n is source else concrete(n.meta["val"]))
    moved: Any = as_view(node.target(*args, **node.kwargs), view, base)  # type: ignore[operator]
    if moved is not None:
        walk.views[node] = moved


@rule("dropout", "to", "_to_copy", "type_as", "float", "contiguous", "clone", "alias", "detach", "neg", "dropout_",
      "lift_fresh_copy", operands=2, kind=TRANSPARENT)  # fmt: skip
def same(walk: ChannelTrace, node: fx.Node) -> None:
    """Casts (to the type of another value, too), signs and inactive dropout keep the channels, up to one factor."""
    source = node.all_input_nodes[0]
    for table in (walk.labels, walk.squares, walk.means):
        if source in table:
            table[node] = table[source]
    if name_of(node) != "neg" and source in walk.views:
        walk.views[node] = walk.views[source]


SOURCES |= {moved, same}  # these rules carry parameters, too


@rule("zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full",
      "sym_size", "sym_numel", "sym_stride")  # fmt: skip
def measured(walk: ChannelTrace, node: fx.Node) -> None:
    """These operators use only the shape and the type of a value."""


@rule("view_as", "reshape_as", "expand_as", operands=2)
def shaped_like(walk: ChannelTrace, node: fx.Node) -> None:
    """Channels go where their elements go in the shape of another value, of which nothing else is used."""
    if (labels := walk.labels.get(arguments(node)[0])) is None:
        return walk.pin(arguments(node)[0], f"its square or mean passes through `{name_of(node)}`")
    shape = shape_of(node)
    walk.labels[node] = labels.expand(shape) if name_of(node) == "expand_as" else labels.reshape(shape)


@rule("cat", "stack")
def concatenated(walk: ChannelTrace, node: fx.Node) -> None:
    """Channels go where their elements go if every part has channels; parts that no weight writes absorb nothing.

    Parts without elements, such as a model's registers of which it has none, are no parts.
    """
    parts = [as_value(walk, n) for n in arguments(node)[0] if 0 not in shape_of(n)]
    if any(labels is None for labels in parts):
        return pin_all(walk, node, f"it is joined (`{name_of(node)}`) with values that no weight writes")
    target: Any = node.target
    walk.labels[node] = target(parts, *arguments(node)[1:])


@rule("index", "index_select", "cumsum", "constant_pad_nd", "pad", kind=SOURCES)
def tokenwise(walk: ChannelTrace, node: fx.Node) -> None:
    """Operators that pick or sum tokens do the same to each channel, unless they act along the axis of the channels."""
    x, size = arguments(node)[0], shape_of(node)
    labels = as_value(walk, x)
    if labels is None and not any(walk.touches(n) for n in node.all_input_nodes):
        return
    ids = last_axis(labels) if labels is not None else None
    if ids is None or not size or touches_last_axis(node, len(shape_of(x))) or size[-1] != len(ids):
        return pin_all(walk, node, f"`{name_of(node)}` picks among its channels")
    walk.labels[node] = ids.expand(size)


def touches_last_axis(node: fx.Node, dims: int) -> bool:
    """Return whether such an operator acts along the last axis, or changes more than where tokens stand."""
    _, where, *rest = arguments(node)
    if name_of(node) == "index":
        found = [None if i is None else i.meta["val"] for i in where]
        return sum(i.dim() if i is not None and i.dtype is torch.bool else 1 for i in found) >= dims
    if name_of(node) in ("constant_pad_nd", "pad"):
        return any(where[:2]) or any(rest)
    return bool(where % dims == dims - 1)


@rule("masked_fill")
def masked(walk: ChannelTrace, node: fx.Node) -> None:
    """A mask that puts zeros in place of tokens is a factor of zero for all channels of a token."""
    x, mask, value = arguments(node)[:3]
    if x not in walk.labels or value != 0 or (shape_of(mask) or (1,))[-1] != 1 or last_axis(walk.labels[x]) is None:
        return pin_all(walk, node, "`masked_fill` puts numbers in its place")
    walk.labels[node] = walk.labels[x]


def as_value(walk: ChannelTrace, node: Any) -> Tensor | None:
    """Return the labels of an operand; a parameter that is an operand itself writes channels.

    They lie along its last axis, or, of a vector that is seen in another shape, wherever its elements lie.
    """
    if not isinstance(node, fx.Node) or node in walk.labels:
        return walk.labels.get(node)
    view = walk.view(node)
    if view is None or not view.size or view.offset or (region := view.region()) is None:
        return None
    whole, along = View.whole(view.name, view.shape), view.along(-1)
    if len(view.shape) == 1 and region == whole.region() and along != (0, *region):  # a bias in heads
        ids = walk.fresh_ids(view.shape[0])
        walk.use(node, whole, 0, ids)
        walk.labels[node] = ids.as_strided(view.size, view.stride, view.first)
    elif along is None:
        return None
    else:
        walk.use(node, view, -1, walk.fresh(node))
    return walk.labels[node]


def source_of(node: fx.Node) -> fx.Node:
    """Return the operator that computed a value, before any data movement."""
    while RULES.get(name_of(node)) in TRANSPARENT and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def origin(node: fx.Node) -> str:
    """Describe a value by the operator and the module that computed it."""
    source = source_of(node)
    stack = source.meta.get("nn_module_stack") or {"": ("the model",)}
    module = f"`{list(stack.values())[-1][0]}`"
    is_operator = isinstance(source.target, torch._ops.OpOverload)
    return f"the output of `{name_of(source)}` in {module}" if is_operator else f"the output of {module}"
