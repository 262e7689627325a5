"""A loop over experts, whose products with `W[0]`, `W[1]`, … see rows of the same shape, is one batched product."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from quantize.graph.rules.table import name_of
from quantize.graph.writer import Writer

ATEN = torch.ops.aten
CASTS = {"to", "_to_copy", "contiguous", "clone", "alias", "detach"}


@dataclass(frozen=True)
class Loop:
    """The products of a loop over the experts of a stack."""

    graph: fx.Graph
    stack: fx.Node

    def rewrite(self) -> None:
        """Replace the products by parts of one product, if they are those of all experts, each once."""
        found = [product_of(number, weight) for number, weight in taken_one_by_one(self.stack)]
        products = {product[0]: product[1:] for product in found if product is not None}
        if len(found) != self.stack.meta["val"].shape[0] or sorted(products) != [*range(len(found))]:
            return
        nodes, sources = [products[e][0] for e in sorted(products)], [products[e][1] for e in sorted(products)]
        alike = len({str(x.meta["val"].shape) for x in sources}) == 1 and sources[0].meta["val"].dim() > 1
        turned = {transposed for _, _, transposed, _ in products.values()}
        if not alike or len(turned) > 1 or (len({*self.stack.users}) != len(found) and not unbound(self.stack)):
            return
        if {*nodes} & ancestors(sources):
            return
        with self.graph.inserting_before(nodes[-1]):
            writer = Writer(self.graph, nodes[0])
            y = self._batched(writer, sources, turned.pop())
            for expert, node in enumerate(nodes):
                part, x, bias = writer.add(ATEN.select.int, y, 0, expert), sources[expert], products[expert][3]
                if (leading := x.meta["val"].dim() - 1) > 1:
                    part = writer.add(ATEN.unflatten.int, part, 0, [writer.size(x, n) for n in range(leading)])
                part = part if bias is None else writer.add(ATEN.add.Tensor, part, bias)
                node.replace_all_uses_with(part)

    def _batched(self, writer: Writer, sources: list[fx.Node], transposed: bool) -> fx.Node:
        """Return the products of all experts with their rows, [experts, rows, N]."""
        flat = {x: writer.add(ATEN.flatten.using_ints, x, 0, -2) for x in dict.fromkeys(sources)}
        if len(flat) == 1:
            x = writer.add(ATEN.expand.default, flat[sources[0]], [len(sources), -1, -1])
        else:
            x = writer.add(ATEN.stack.default, [flat[x] for x in sources])
        W = self.stack if transposed else writer.add(ATEN.transpose.int, self.stack, 1, 2)
        y: fx.Node = writer.add(ATEN.bmm.default, x, W)
        return y


def product_of(number: int, weight: fx.Node) -> tuple[int, fx.Node, fx.Node, bool, fx.Node | None] | None:
    """Return expert, product, rows, whether the weight is multiplied as [K, N], and bias; None if it is another."""
    turned = False
    while len(weight.users) == 1:
        user = next(iter(weight.users))
        name, args = name_of(user), user.args
        if transpose_of(user) or name in CASTS:
            weight, turned = user, turned != transpose_of(user)
            continue
        bias: Any = args[2] if name == "linear" and len(args) > 2 else None
        if name not in {"linear", "matmul", "mm"} or args[1] is not weight or args[0] is weight:
            return None
        return number, user, args[0], turned != (name != "linear"), bias  # type: ignore[return-value]
    return None


def taken_one_by_one(stack: fx.Node) -> Iterator[tuple[int, fx.Node]]:
    """Yield the weights that are taken from a stack, each with the number of its expert."""
    for user in stack.users:
        if name_of(user) == "select" and user.args[1] == 0:
            yield user.args[2], user  # type: ignore[misc]
        elif unbound(stack):
            yield from ((part.args[1], part) for part in user.users)  # type: ignore[misc]


def unbound(stack: fx.Node) -> bool:
    """Return whether a stack is read in no other way than one weight after the other."""
    reads = [name_of(user) for user in stack.users]
    alone = all(n.target is operator.getitem for user in stack.users for n in user.users)
    return reads == ["unbind"] and len(next(iter(stack.users)).args) == 1 and alone


def transpose_of(node: fx.Node) -> bool:
    """Return whether a node exchanges the last two axes and nothing else."""
    name, args = (name_of(node), node.args) if node.op == "call_function" else ("", ())
    if name not in {"transpose", "permute", "t", "numpy_T"}:
        return False
    count = int(node.meta["val"].dim())
    if name == "transpose":
        return {args[1] % count, args[2] % count} == {count - 1, count - 2}  # type: ignore[operator]
    if name == "permute":
        return [axis % count for axis in args[1]] == [*range(count - 2), count - 1, count - 2]  # type: ignore[union-attr, operator]
    return count == 2


def ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    """Return the nodes that some nodes depend on, themselves among them."""
    seen, ahead = set[fx.Node](), list(nodes)
    while ahead:
        node = ahead.pop()
        if node not in seen:
            seen.add(node)
            ahead += node.all_input_nodes
    return seen


def sort_topologically(graph: fx.Graph) -> None:
    """Bring each node behind its inputs, and leave the order as it is where that is so."""
    done, last = set[fx.Node](), next(iter(graph.nodes))
    for node in list(graph.nodes):
        ahead = [node]
        while ahead:
            missing = [n for n in ahead[-1].all_input_nodes if n not in done]
            if missing:
                ahead.append(missing[0])
                continue
            found = ahead.pop()
            if found not in done:
                done.add(found)
                if found is not last:
                    last.append(found)
                    last = found
