"""A loop over experts whose rows are the parts of one split, joined again, is one grouped product (JetMoE)."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from quantize.graph.experts import grouped_mm
from quantize.graph.loops import product_of, taken_one_by_one
from quantize.graph.rules.table import name_of
from quantize.graph.writer import ATEN, Writer


def group_split_rows(graph: fx.Graph, stack: fx.Node) -> None:
    """Replace the products of all experts of a stack, in their order, by a grouped product, if they are of that form.

    That is `cat([linear(part, W[e]) for e, part in enumerate(x.split(sizes))])`, or `part @ W[e]`, without biases,
    where `sizes` are the numbers of a tensor.
    """
    found = sorted((p for p in (product_of(*taken) for taken in taken_one_by_one(stack)) if p), key=lambda p: p[0])
    count = stack.meta["val"].shape[0]
    turned = {p[3] for p in found}
    if [p[0] for p in found] != [*range(count)] or len(stack.users) != count or len(turned) > 1:
        return
    products = [p[1] for p in found]
    split, joined = split_of([p[2] for p in found]), {user for product in products for user in product.users}
    if split is None or any(p[4] for p in found) or len(joined) > 1 or not is_cat_of(cat := joined.pop(), products):
        return
    if (sizes := numbers_of(split.args[1], count)) is not None:
        with graph.inserting_before(cat):
            writer = Writer(graph, cat)
            ends = writer.add(ATEN.to.dtype, writer.add(ATEN.cumsum.default, sizes, 0), torch.int32)
            W = stack if turned.pop() else writer.add(ATEN.transpose.int, stack, 1, 2)
            y = writer.add(grouped_mm, split.args[0], W, offs=ends)
        cat.replace_all_uses_with(y)


def split_of(parts: list[fx.Node]) -> fx.Node | None:
    """Return the split along the first axis whose parts these are, in order; None if there is none."""
    whole: Any = parts[0].args[0] if parts[0].target is operator.getitem else None
    if whole is None or name_of(whole) != "split_with_sizes" or [*whole.args[2:]] not in ([], [0]):
        return None
    taken = [(part.target, part.args) for part in parts]
    return whole if taken == [(operator.getitem, (whole, n)) for n in range(len(parts))] else None


def is_cat_of(node: fx.Node, products: list[fx.Node]) -> bool:
    """Return whether a node joins products along the first axis, in order."""
    return name_of(node) == "cat" and node.args[0] == products and [*node.args[1:]] in ([], [0])


def numbers_of(sizes: Any, count: int) -> fx.Node | None:
    """Return the tensor of which sizes are the numbers, one after the other; None if they are none of one tensor's."""
    elements: Any = [size.args[0] for size in sizes if isinstance(size, fx.Node) and name_of(size) == "item"]
    whole = elements[0].args[0] if len(elements) == len(sizes) == count else None
    taken = [(element.target, element.args) for element in elements]
    if whole is None or name_of(whole) != "unbind" or taken != [(operator.getitem, (whole, n)) for n in range(count)]:
        return None
    return whole.args[0]  # type: ignore[no-any-return]
