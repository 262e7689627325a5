"""The linears of a checkpoint are found by the names and shapes of its tensors, where no code of the model says more.

Models are stacks of layers, and the number of a layer stands in the names of its tensors. What lies outside of all
numbered layers is an embedding, a head or a norm, and stays as it is in the file; so do norms, biases and convolutions
within, which are no matrices.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantize.errors import UsageError
from quantize.export.model_free.experts import (
    FEWEST,
    LAYER,
    WEIGHT,
    Shapes,
    containers_of,
    parent,
    routers_of,
    stacks_of,
)


@dataclass(frozen=True)
class StoredLinear:
    """A linear as files hold it: a matrix, some rows of one matrix of a stack of experts, or a whole stack.

    Attributes:
        path: the path of its module in checkpoints.
        weight: the name of the tensor.
        rows, columns: the shape of its weight, or of that of each expert.
        expert: which matrix of a stack it is; None for a matrix alone, or a whole stack.
        first: its first row in that matrix.
        transposed: whether that matrix is stored as [in, out].
        experts: the number of experts of a whole stack, whose rows follow one another; None for one matrix.
    """

    path: str
    weight: str
    rows: int
    columns: int
    expert: int | None = None
    first: int = 0
    transposed: bool = False
    experts: int | None = None

    @property
    def all_rows(self) -> int:
        """The number of rows, of all experts together."""
        return self.rows * (self.experts or 1)


def find_linears(
    shapes: Shapes,
    encoded: Collection[str],
    config: Mapping[str, Any],
    transposed: Mapping[str, bool] | None = None,
    splits: bool = True,
) -> tuple[list[StoredLinear], dict[str, str]]:
    """Return the linears to round, in the order of `shapes`, and for each other weight the reason why it stays.

    Args:
        shapes: the shapes of all tensors as floats, by name.
        encoded: the tensors that are quantized already; if there are any, all others stay in floating point.
        config: the model's config, for the size of its vocabulary.
        transposed: whether weights are stored as [in, out], for those of which the model's class tells it.
        splits: whether stacks of experts become one linear for each expert.

    Raises:
        UsageError: a bias says that a weight is stored as [in, out], and no class says so of all weights.
    """
    told, containers = transposed or {}, containers_of(shapes)
    routers = routers_of(shapes, containers)
    stacks, words = stacks_of(shapes, containers, routers), rows_of_tables(shapes, config)
    stacks |= {name: told[name] for name in stacks if name in told}
    found, reasons = list[StoredLinear](), dict[str, str]()
    for name, shape in shapes.items():
        if not name.endswith(WEIGHT) and name not in stacks:
            continue
        if encoded and name not in encoded:
            reasons[name] = "the source leaves it in floating point"
        elif not LAYER.match(name):
            reasons[name] = "outside of all numbered layers"
        elif name in stacks:
            if (turned := stacks[name]) is None:
                reasons[name] = "nothing tells whether the stack is [experts, out, in] or [experts, in, out]"
            else:
                found += split_stack(name, shape, turned) if splits else [whole_stack(name, shape, turned)]
        elif len(shape) != 2:
            reasons[name] = "no matrix"
        elif name in routers:
            reasons[name] = "it chooses experts"
        elif shape[0] in words:
            reasons[name] = "as many rows as a table of words"
        elif min(shape) < FEWEST:
            reasons[name] = f"fewer than {FEWEST} rows or columns"
        elif told.get(name):
            found.append(StoredLinear(name.removesuffix(WEIGHT), name, shape[1], shape[0], transposed=True))
        else:
            require_out_in(name, shapes)
            found.append(StoredLinear(name.removesuffix(WEIGHT), name, *shape))
    return found, reasons


def whole_stack(name: str, shape: tuple[int, ...], transposed: bool) -> StoredLinear:
    """Return a stack as one linear, under the name of its parameter."""
    rows, columns = (shape[2], shape[1]) if transposed else shape[1:]
    return StoredLinear(name, name, rows, columns, transposed=transposed, experts=shape[0])


def split_stack(name: str, shape: tuple[int, ...], transposed: bool) -> Iterator[StoredLinear]:
    """Yield the linears of a stack under the names that checkpoints have for them one by one.

    A name of three words, `A_B_C`, is that of two linears one after the other, `A_C` and `B_C`.
    """
    container, leaf = parent(name.removesuffix(WEIGHT)), name.removesuffix(WEIGHT).rpartition(".")[2]
    rows, columns = (shape[2], shape[1]) if transposed else shape[1:]
    words = leaf.split("_")
    halves = len(words) == 3 and not transposed and rows % 2 == 0
    parts = [f"{word}_{words[2]}" for word in words[:2]] if halves else [leaf]
    size = rows // len(parts)
    for expert in range(shape[0]):
        for number, part in enumerate(parts):
            yield StoredLinear(f"{container}.{expert}.{part}", name, size, columns, expert, number * size, transposed)


def rows_of_tables(shapes: Shapes, config: Mapping[str, Any]) -> set[int]:
    """Return the numbers of rows of the tables of words, by the config's size of the vocabulary."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    sizes = [part["vocab_size"] for part in parts if isinstance(part.get("vocab_size"), int)]
    outside = [shape[0] for name, shape in shapes.items() if len(shape) == 2 and not LAYER.match(name)]
    return {rows for rows in outside if sizes and rows >= min(sizes)}


def require_out_in(name: str, shapes: Shapes) -> None:
    """Check by its bias, if it has one, that a weight is stored as [out, in].

    Raises:
        UsageError: it is not.
    """
    bias, shape = shapes.get(f"{name.removesuffix(WEIGHT)}.bias", ()), shapes[name]
    if len(bias) == 1 and bias[0] != shape[0] and bias[0] == shape[1]:
        raise UsageError(
            f"{name} {list(shape)} has a bias of {bias[0]} numbers, so it is stored as [in, out], and nothing tells "
            "how square weights beside it are stored; only a class that transformers has tells it of each weight"
        )
