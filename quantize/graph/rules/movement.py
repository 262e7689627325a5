"""Operators that move elements and change none: channels go where their elements go."""

from __future__ import annotations

import torch
from torch import fx

from quantize.graph.labels import Walk, move
from quantize.graph.rules.table import RULES, TRANSPARENT, name_of, rule


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
    "stack",
    "contiguous",
    "clone",
    "alias",
    "detach",
    "repeat",
    "repeat_interleave",
    "narrow",
    "flatten",
    "unflatten",
    "movedim",
    "getitem",
    kind=TRANSPARENT,
)
def moved(walk: Walk, node: fx.Node) -> None:
    """Data movement: channels go where their elements go."""
    if any(n in walk.squares for n in node.all_input_nodes):
        return walk.pin(node.all_input_nodes[0], f"its square passes through `{name_of(node)}`")
    walk.labels[node] = move(walk, node)


@rule("cat")
def concatenated(walk: Walk, node: fx.Node) -> None:
    """Data movement if every part has channels; parts that no weight writes cannot absorb anything."""
    if all(n in walk.labels for n in node.all_input_nodes):
        return moved(walk, node)
    for source in node.all_input_nodes:
        walk.pin(source, "it is joined (`cat`) with values that no weight writes")


@rule("dropout", "to", "_to_copy", "type_as", "float", "neg", "dropout_", kind=TRANSPARENT)
def same(walk: Walk, node: fx.Node) -> None:
    """Casts, signs and inactive dropout: the same channels, up to one common factor."""
    source = node.all_input_nodes[0]
    for table in (walk.labels, walk.squares):
        if source in table:
            table[node] = table[source]


def source_of(node: fx.Node) -> fx.Node:
    """The operator that computed a value, behind any data movement."""
    while RULES.get(name_of(node)) in TRANSPARENT and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def origin(node: fx.Node) -> str:
    """A value in words, by the operator and the module that computed it."""
    source = source_of(node)
    stack = source.meta.get("nn_module_stack") or {"": ("the model",)}
    module = f"`{list(stack.values())[-1][0]}`"
    is_operator = isinstance(source.target, torch._ops.OpOverload)
    return f"the output of `{name_of(source)}` in {module}" if is_operator else f"the output of {module}"
