"""A batch between two blocks is split into its rows, by what the graph says of the shape of each value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from quantize.graph.interpreter import Values
from quantize.graph.program import Program
from quantize.graph.shapes import ShapeInfo

Shapes = Mapping[str, tuple[int, ...]]  # of each input of a batch, by argument of forward


def len_of(shapes: Shapes) -> int:
    """Return the number of rows of a batch."""
    return next(iter(shapes.values()))[0]


def halved_shapes(shapes: Shapes) -> list[Shapes]:
    """Return the shapes of the two halves of a batch; one row is not split."""
    rows = len_of(shapes)
    counts = [rows - rows // 2, rows // 2] if rows > 1 else [rows]
    return [{name: (count, *shape[1:]) for name, shape in shapes.items()} for count in counts]


def halved(program: Program, values: Values, shapes: Shapes) -> Iterator[Values]:
    """Yield the values of the two halves of a batch, or those of a batch of one row as they are.

    Raises:
        ValueError: a value has no axis of rows, though its shape depends on their number.
    """
    parts = [ShapeInfo(program, part) for part in halved_shapes(shapes)]
    split = {node: split_value(node, value, parts) for node, value in values.items()}
    yield from ({node: found[number] for node, found in split.items()} for number in range(len(parts)))


def split_value(node: fx.Node, value: Any, parts: list[ShapeInfo]) -> list[Any]:
    """Return a node's value for each part of a batch."""
    if len(parts) == 1:
        return [value]
    expected = node.meta.get("val")
    if isinstance(expected, torch.SymInt):
        return [part.number(expected) for part in parts]
    if not isinstance(value, Tensor) or not isinstance(expected, Tensor):
        return [value] * len(parts)
    shapes = [part.shape(node) for part in parts]
    if all(shape == value.shape for shape in shapes):
        return [value] * len(parts)
    sizes = list(zip(*shapes, strict=True))
    axes = [axis for axis, found in enumerate(sizes) if set(found) != {value.shape[axis]}]
    if len(axes) != 1 or sum(sizes[axes[0]]) != value.shape[axes[0]]:
        raise ValueError(f"{node.name} {list(value.shape)} has no axis of rows")
    return [part.clone() for part in value.split(list(sizes[axes[0]]), axes[0])]
