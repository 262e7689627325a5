"""The bytes of a program's values and the multiply-adds of its nodes are known before anything runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from quantize.graph.inputs import BATCH
from quantize.graph.linears import by_input
from quantize.graph.program import Program, Segment
from quantize.graph.rules.table import name_of

PRODUCTS = {"linear", "addmm", "matmul", "mm", "bmm", "_grouped_mm", "grouped_mm", "grouped_mm_fallback"}
ATTENTION = "scaled_dot_product_attention"
Shape = Callable[[fx.Node], Sequence[int]]


@dataclass(frozen=True)
class ShapeInfo:
    """A program with inputs of certain shapes.

    Attributes:
        shapes: the shape of each input, by argument of forward.
    """

    program: Program
    shapes: Mapping[str, Sequence[int]]

    @functools.cached_property
    def _symbols(self) -> dict[Any, int]:
        found: dict[Any, int] = {}
        for name, shape in self.shapes.items():
            example = self.program.inputs[name].meta.get("val")
            for axis, size in zip(() if example is None else example.shape, shape, strict=False):
                if isinstance(axis, torch.SymInt):
                    found[axis.node.expr] = size
        return found

    @functools.cached_property
    def rows(self) -> int:
        """The number of tokens of one batch."""
        return max(math.prod(shape[:2]) for shape in self.shapes.values())

    def number(self, size: int | torch.SymInt) -> int:
        """Return a size, which may depend on sizes of the inputs, as a number; what data decide on is one a token."""
        if isinstance(size, int):
            return self.rows if self.program.export_error and size == BATCH else size  # a batch of rows, not in a graph
        if (expression := size.node.expr) not in self._known:
            found = expression.subs(self._symbols)
            self._known[expression] = int(found.subs(dict.fromkeys(found.free_symbols, self.rows)))
        return self._known[expression]

    @functools.cached_property
    def _known(self) -> dict[Any, int]:
        return {}

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Return the shape of a node's value."""
        return tuple(self.number(size) for size in node.meta["val"].shape)

    def storages(self, node: fx.Node) -> dict[int, int]:
        """Return the storages that a node's value holds, identity → bytes; a view holds its base's storage."""
        value = node.meta.get("val")
        tensors = [x for x in (value if isinstance(value, list | tuple) else [value]) if isinstance(x, Tensor)]
        if self.program.export_error:
            return {id(x): math.prod(map(self.number, x.shape)) * 4 for x in tensors}
        return {x.untyped_storage()._cdata: self.number(x.untyped_storage().nbytes()) for x in tensors}


def multiply_adds(node: fx.Node, shape: Shape) -> int:
    """Return the multiply-adds of a matrix product or of attention, and 0 for all other nodes."""
    name = name_of(node) if node.op == "call_function" else ""
    if name in PRODUCTS:
        inner = shape(node.args[1 if name == "addmm" else 0])[-1]  # type: ignore[arg-type]
        return math.prod(shape(node)) * inner
    if name != ATTENTION:
        return 0
    query, key = (shape(n) for n in node.args[:2])  # type: ignore[arg-type]
    return 2 * math.prod(query) * key[-2]


@dataclass
class LiveBytes:
    """The bytes of the values that are alive while one batch runs through a program.

    Attributes:
        peaks: for each segment the most bytes that are alive within it.
        linear_inputs: for each segment the most bytes that are alive at the first linear of an input, or after the
            segment.
        borders: for each segment the bytes that are alive after it.
    """

    peaks: dict[str, int]
    linear_inputs: dict[str, int]
    borders: dict[str, int]


def walk(sizes: ShapeInfo) -> LiveBytes:
    """Follow the values of one batch from the node that makes them to their last use."""
    program, held = sizes.program, dict[fx.Node, dict[int, int]]()
    found = LiveBytes({}, {}, {})
    for node in program.inputs.values():
        held[node] = {id(node): 8 * math.prod(next(iter(sizes.shapes.values())))}
    for segment in program.segments:
        sources, peak, stop = first_linear_per_input(program, segment), 0, total(held)
        for node in (n for n in segment.nodes if n not in program.turned_stacks):
            stop = max(stop, total(held) if node in sources else 0)
            held[node] = sizes.storages(node)
            peak = max(peak, total(held))
            for source in program.last_used_by.get(node, ()):
                held.pop(source, None)
        found.peaks[segment.name], found.borders[segment.name] = peak, total(held)
        found.linear_inputs[segment.name] = max(stop, total(held))
    return found


def total(held: Mapping[fx.Node, Mapping[int, int]]) -> int:
    """Return the bytes of all storages, each of which counts once."""
    return sum({key: size for storages in held.values() for key, size in storages.items()}.values())


def first_linear_per_input(program: Program, segment: Segment) -> set[fx.Node]:
    """Return the first node of those of linears that share an input, for each such input."""
    return {sharing[0].node for sharing in by_input(program.linears(segment))}
