"""Round columns in turn, each moved by what the rounding of those before it got wrong."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.calibration.precision import bfloat16_products, plus_product, product_dtype
from quantize.quantizers.base import nearest
from quantize.quantizers.hessian import panels
from quantize.scheme import WeightArgs

LEAF = 16  # columns that move one another one by one; more of them do so by a matrix product


@dataclass(frozen=True)
class Grid:
    """The grid of some columns [b] of N rows: scale and zero point [b, N]."""

    scale: Tensor
    zero_point: Tensor
    args: WeightArgs

    def round(self, w: Tensor, column: int) -> Tensor:
        """The nearest integers to one column w [N]."""
        return nearest(w, self.scale[column], self.zero_point[column], self.args)

    def value(self, q: Tensor) -> Tensor:
        """The weights [b, N] that integers stand for."""
        return (q - self.zero_point) * self.scale

    def value_of(self, q: Tensor, column: int) -> Tensor:
        """The same of one column [N]."""
        return (q - self.zero_point[column]) * self.scale[column]


@dataclass(frozen=True)
class Columns:
    """The columns in the order in which they are rounded; each has the grid of its group.

    Attributes:
        scale, zero_point: [G, N].
        group: of each column, [K].
    """

    scale: Tensor
    zero_point: Tensor
    group: Tensor
    args: WeightArgs

    def grid(self, block: slice) -> Grid:
        """The grid of some of them."""
        group = self.group[block]
        return Grid(self.scale[group], self.zero_point[group], self.args)


def compensated(R: Tensor, A: Tensor, columns: Columns, block_size: int) -> Tensor:
    """GPTQ: integers int8 [K, N] of weights, whose errors W - Ŵ take the place of the weights in R [K, N].

    Column k is rounded from wₖ + Σ (wⱼ - ŵⱼ) Aⱼₖ over j < k, where H = (A + I) D (A + I)ᵀ: the same as GPTQ's updates
    by the inverse of H (theorem 6 of QuIP, arXiv 2307.13304), without the inverse. A [K, K]: only what stands above
    the diagonal is read.
    """
    Q, errors = torch.empty_like(R, dtype=torch.int8), R.to(product_dtype())
    for block in panels(len(R), block_size):
        target = plus_product(R[block], A[: block.start, block].T, errors[: block.start])
        Q[block], R[block] = round_in_turn(target, R[block], A[block, block], columns.grid(block))
        errors[block] = R[block]
    return Q


def sweep(Q: Tensor, R: Tensor, H: Tensor, columns: Columns, block_size: int) -> None:
    """One round of coordinate descent on tr(R H Rᵀ): each column again, given all others; Q and R change in place.

    Args:
        Q: integers [K, N].
        R: W - Ŵ [K, N].
        H: symmetric [K, K].
        columns: their grids.
        block_size: columns between two products with all of H.
    """
    errors = R.to(product_dtype())
    for block in panels(len(R), block_size):
        grid, diagonal = columns.grid(block), H.diagonal()[block]
        held = grid.value(Q[block])
        target = held + H[block].to(errors) @ errors / diagonal[:, None]
        Q[block], change = round_in_turn(target, held, H[block, block] / diagonal, grid)
        R[block] += change
        errors[block] = R[block]


def round_in_turn(target: Tensor, reference: Tensor, feedback: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Integers q [b, N], and the errors e = reference - value(q), column after column.

    Args:
        target: [b, N] what is rounded: column k from targetₖ + Σ eⱼ feedbackⱼₖ over j < k; overwritten.
        reference: [b, N].
        feedback: [b, b], only what stands above the diagonal is read.
        grid: of these columns.
    """
    q, e = torch.empty_like(target), torch.empty_like(target)
    with bfloat16_products(False):  # of few columns: rounding the operands would take longer than the product
        round_columns(slice(0, len(target)), target, reference, feedback, grid, q, e)
    return q, e


def round_columns(
    part: slice, target: Tensor, reference: Tensor, feedback: Tensor, grid: Grid, q: Tensor, e: Tensor
) -> None:
    """Write q and e of a part of the columns: of one half, then of the other, moved by the errors of the first."""
    start, stop = part.start, part.stop
    if stop - start <= LEAF:
        for k in range(start, stop):
            w = torch.addmv(target[k], e[start:k].T, feedback[start:k, k])
            q[k] = grid.round(w, k)
            torch.sub(reference[k], grid.value_of(q[k], k), out=e[k])
        return
    middle = (start + stop) // 2
    round_columns(slice(start, middle), target, reference, feedback, grid, q, e)
    target[middle:stop].addmm_(feedback[start:middle, middle:stop].T, e[start:middle])
    round_columns(slice(middle, stop), target, reference, feedback, grid, q, e)
