"""Products with gathered weights, einsums, and loops over experts become products of a stack, as `find_experts` knows.

With a gather `W[numbers]` each row has the weights of its expert: the rows are sorted by expert, multiplied in groups,
and put back. In a loop with `W[0]`, `W[1]`, … whose rows have the same shape, the products become one batched product.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from quantize.graph.einsum import ExpertProduct, expert_product, matmul_letters, parse
from quantize.graph.experts import CASTS, grouped_mm
from quantize.graph.loops import Loop, sort_topologically, transpose_of
from quantize.graph.rules.table import name_of
from quantize.graph.split_rows import group_split_rows
from quantize.graph.writer import Writer

ATEN = torch.ops.aten


def write_as_stacks(module: fx.GraphModule, parameters: Collection[fx.Node]) -> None:
    """Rewrite products of experts, in place.

    Args:
        module: an exported graph.
        parameters: the placeholders of its parameters.
    """
    sorts: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for stack in (node for node in parameters if node.meta["val"].dim() == 3 and node.meta["val"].shape[0] > 1):
        group_split_rows(module.graph, stack)
        Loop(module.graph, stack).rewrite()
        for node in list(module.graph.nodes):
            found = Gathered.find(node, stack)
            if found is not None:
                with module.graph.inserting_before(node):
                    y = found.lower(Writer(module.graph, node), sorts)
                node.replace_all_uses_with(y)
    sort_topologically(module.graph)
    module.graph.eliminate_dead_code()
    module.recompile()


@dataclass(frozen=True)
class Gathered:
    """A product of rows with the weights of an expert each, or of all rows with all experts.

    Attributes:
        stack: the weights of all experts.
        x: the rows.
        numbers: the number of each row's expert, int64 [*B]; None if B is the axis of all experts.
        letters: the letters of the product.
        transposed: whether the stack is [experts, K, N].
    """

    stack: fx.Node
    x: fx.Node
    numbers: fx.Node | None
    letters: ExpertProduct
    transposed: bool

    @classmethod
    def find(cls, node: fx.Node, stack: fx.Node) -> Gathered | None:
        """Return what a node multiplies with a stack; None if nothing, or if `find_experts` knows it as it is."""
        kind, args = name_of(node) if node.op == "call_function" else "", node.args
        operands: Any = args[1] if kind == "einsum" else args[:2] if kind in {"bmm", "matmul"} else ()
        if len(operands) != 2 or not all(isinstance(x, fx.Node) and axes(x) > 1 for x in operands):
            return None
        named = parse(str(args[0])) if kind == "einsum" else matmul_letters(*map(axes, operands))
        taken = [taken_from(x, stack) for x in operands]
        if named is None or (taken[0] is None) == (taken[1] is None):
            return None
        place = 0 if taken[1] is None else 1
        weight, x, (numbers, turned) = operands[place], operands[1 - place], taken[place] or (None, False)
        rows = named[1 - place]
        alone = "".join(a for a, n in zip(rows, x.meta["val"].shape, strict=True) if isinstance(n, int) and n == 1)
        letters = expert_product(rows, named[place], named[2])
        if letters is None or (numbers is None and (kind != "einsum" and place == 1 and letters.present and not alone)):
            return None
        sizes = {a: str(n) for a, n in zip(named[place], weight.meta["val"].shape, strict=True)}
        differing = {a for a, n in zip(rows, x.meta["val"].shape, strict=True) if sizes.get(a, str(n)) != str(n)}
        if differing - {*alone} or (numbers is not None and not {*letters.batch} & ({*rows} - differing)):
            return None
        return cls(stack, x, numbers, letters, letters.transposed != turned)

    def lower(self, writer: Writer, sorts: dict[fx.Node, tuple[fx.Node, fx.Node]]) -> fx.Node:
        """Add the nodes of the product, and return the last one.

        For each `numbers`, `sorts` holds the order of the rows and where those of each expert end.
        """
        found, sizes = self.letters, self.x.meta["val"].shape
        single = [a for a in found.rows if a != found.columns and sizes[found.rows.index(a)] == 1]
        present = "".join(a for a in found.present if a not in single)
        free = "".join(a for a in found.free if a not in single)
        x, rows = self.x, found.rows
        for letter in single:
            x, rows = writer.squeezed(x, rows.index(letter)), rows.replace(letter, "")
        x = writer.permuted(x, rows, present + free + found.columns)
        inner = [writer.size(x, len(present) + n) for n in range(len(free))]
        W = self.stack if self.transposed else writer.add(ATEN.transpose.int, self.stack, 1, 2)
        product = self._of_all if self.numbers is None else self._of_each
        y = product(writer, x, W, present, len(free), sorts)  # [*B, M, N], without M if nothing is free
        if len(free) > 1:
            y = writer.add(ATEN.unflatten.int, y, len(found.batch), inner)
        lone = [a for a in single if a in found.free]
        for _ in lone:
            y = writer.add(ATEN.unsqueeze.default, y, len(found.batch))
        return writer.permuted(y, found.batch + "".join(reversed(lone)) + free + found.outputs, found.out)

    def _of_all(
        self, writer: Writer, x: fx.Node, W: fx.Node, present: str, free: int, sorts: Mapping[fx.Node, Any]
    ) -> fx.Node:
        del sorts
        if not present:
            x = writer.add(ATEN.unsqueeze.default, x, 0)
            x = writer.add(ATEN.expand.default, x, [writer.size(W, 0), *[-1] * (axes(x) - 1)])
        x = writer.add(ATEN.unsqueeze.default, x, 1) if not free else x
        x = writer.add(ATEN.flatten.using_ints, x, 1, -2) if free > 1 else x
        y: fx.Node = writer.add(ATEN.bmm.default, x, W)
        y = y if free else writer.add(ATEN.squeeze.dim, y, 1)
        return y

    def _of_each(
        self,
        writer: Writer,
        x: fx.Node,
        W: fx.Node,
        present: str,
        free: int,
        sorts: dict[fx.Node, tuple[fx.Node, fx.Node]],
    ) -> fx.Node:
        assert self.numbers is not None
        if self.numbers not in sorts:
            sorts[self.numbers] = writer.sorted(self.numbers, writer.size(W, 0))
        (order, ends), batch = sorts[self.numbers], self.letters.batch
        if not free and (tokens := self._tokens(writer, x, present)) is not None:
            x, place = tokens
            rows = writer.add(ATEN.index.Tensor, x, [writer.add(ATEN.index.Tensor, place, [order])])
        else:
            x = writer.expanded(x, present, batch, self.numbers)
            x = writer.add(ATEN.flatten.using_ints, x, 0, len(batch) - 1) if len(batch) > 1 else x
            rows = writer.add(ATEN.index_select.default, x, 0, order)  # no gather of tokens, as `token_index` knows it
        if free:
            x = writer.add(ATEN.flatten.using_ints, rows, 1, -2) if free > 1 else rows
            ends, rows = (
                writer.add(ATEN.mul.Tensor, ends, writer.size(x, 1)),
                writer.add(ATEN.flatten.using_ints, x, 0, 1),
            )
        y: fx.Node = writer.add(grouped_mm, rows, W, offs=ends)
        y = writer.add(ATEN.unflatten.int, y, 0, [-1, writer.size(x, 1)]) if free else y
        y = writer.add(ATEN.index_select.default, y, 0, writer.add(ATEN.argsort.default, order))
        if len(batch) > 1:
            y = writer.add(ATEN.unflatten.int, y, 0, [writer.size(self.numbers, n) for n in range(len(batch))])
        return y

    def _tokens(self, writer: Writer, x: fx.Node, present: str) -> tuple[fx.Node, fx.Node] | None:
        """Return rows of tokens [T, K] and the token of each row of the product, if the rows are a gather of tokens."""
        assert self.numbers is not None
        where: Any = x.args[1] if name_of(x) == "index" else ()
        if present == self.letters.batch and len(present) == 1 and len(where) == 1 and axes(where[0]) == 1:
            return x.args[0], where[0]  # type: ignore[return-value]
        if len(present) != 1 or present == self.letters.batch:
            return None
        ones = writer.add(ATEN.ones_like.default, self.numbers)
        counted = writer.add(ATEN.cumsum.default, ones, self.letters.batch.index(present))
        return x, writer.add(ATEN.flatten.using_ints, writer.add(ATEN.sub.Tensor, counted, 1))


def taken_from(node: fx.Node, stack: fx.Node) -> tuple[fx.Node | None, bool] | None:
    """Return by which numbers weights are gathered from a stack, None for all, and whether K and N are exchanged."""
    numbers, turned = None, False
    while node is not stack:
        name, args = (name_of(node), node.args) if node.op == "call_function" else ("", ())
        where: Any = args[1] if len(args) > 1 else None
        if transpose_of(node):
            turned = not turned
        elif name == "index" and numbers is None and len(where) == 1 and where[0] is not None:
            numbers = where[0]
        elif name == "index_select" and numbers is None and where == 0:
            numbers = args[2]
        elif name not in CASTS:
            return None
        if not isinstance(args[0], fx.Node):
            return None
        node = args[0]
    if isinstance(numbers, fx.Node) and numbers.meta["val"].dtype not in (torch.int64, torch.int32):
        return None
    return numbers, turned


def axes(node: fx.Node) -> int:
    """Return the number of axes of a node's value."""
    return int(node.meta["val"].dim())
