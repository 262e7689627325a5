"""A product of two tensors is written with a letter for each axis, as `torch.einsum` takes it."""

from __future__ import annotations

from dataclasses import dataclass

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class ExpertProduct:
    """A product of rows with a weight of each expert, [*B, N, K] or [*B, K, N], of which each row has its own.

    Attributes:
        batch: the letters B, in the order of the weight.
        free: the letters of further axes of the rows, which see the same weight.
        rows: the letters of the rows in their order; those of `batch` that are missing are the same for all.
        columns, outputs: the letters of K and N.
        out: the letters of the product in their order.
        transposed: whether the weight is [*B, K, N].
    """

    batch: str
    free: str
    rows: str
    columns: str
    outputs: str
    out: str
    transposed: bool

    @property
    def present(self) -> str:
        """The letters of B that the rows have."""
        return "".join(letter for letter in self.batch if letter in self.rows)


def expert_product(rows: str, weight: str, out: str) -> ExpertProduct | None:
    """Return the product of rows with weights, each given by its letters; None if it is none of experts."""
    batch, last = weight[:-2], weight[-2:]
    columns = [x for x in last if x in rows and x not in out]
    outputs = [x for x in last if x not in rows and x in out]
    free = "".join(x for x in rows if x not in weight)
    if len(columns) != 1 or len(outputs) != 1 or not batch or not rows.isalpha() or not out.isalpha():
        return None
    sound = len({*weight}) == len(weight) and len({*rows}) == len(rows) and {*out} == {*batch, *free, *outputs}
    if not sound or len(out) != len(batch + free) + 1:
        return None
    return ExpertProduct(batch, free, rows, columns[0], outputs[0], out, last[0] == columns[0])


def parse(equation: str) -> tuple[str, str, str] | None:
    """Return the letters of both operands and of the product; None if they are not all named."""
    operands, arrow, out = equation.replace(" ", "").partition("->")
    parts = operands.split(",")
    return (*parts, out) if arrow and len(parts) == 2 and "." not in equation else None  # type: ignore[return-value]


def matmul_letters(left: int, right: int) -> tuple[str, str, str]:
    """Return the letters of a batched product of as many axes, two at least; leading axes that one lacks come first."""
    batch = LETTERS[: max(left, right) - 2]
    return batch[len(batch) + 2 - left :] + "xy", batch[len(batch) + 2 - right :] + "yz", batch + "xz"
