"""Columns are rounded in turn, and each is first moved by the rounding errors of the columns before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.calibration.precision import plus_product
from quantize.formats import get_format
from quantize.kernels import ops
from quantize.quantizers.hessian import panels
from quantize.scheme.scheme import WeightArgs

LEAF_COLUMNS = 16  # up to so many columns move one another one by one; more columns do so by a matrix product


@dataclass(frozen=True)
class QParams:
    """The grid of some columns [b] of N rows: scale and zero point [b, N]; a symmetric grid has no zero point."""

    scale: Tensor
    zero_point: Tensor | None
    args: WeightArgs

    def value(self, q: Tensor) -> Tensor:
        """Return the weights [b, N] of values of the format."""
        return (q if self.zero_point is None else q - self.zero_point) * self.scale


@dataclass(frozen=True)
class OrderedColumns:
    """The columns in the order in which they are rounded, each with the grid of its group.

    Attributes:
        scale, zero_point: [G, N]; a symmetric grid has no zero point.
        group: the group of each column, [K].
    """

    scale: Tensor
    zero_point: Tensor | None
    group: Tensor
    args: WeightArgs

    def grid(self, block: slice) -> QParams:
        """Return the grid of some columns."""
        group = self.group[block]
        return QParams(self.scale[group], None if self.zero_point is None else self.zero_point[group], self.args)


def gptq_round(R: Tensor, A: Tensor, columns: OrderedColumns, block_size: int, product_dtype: torch.dtype) -> Tensor:
    """Round weights R [K, N] to values of the format by GPTQ, and overwrite R with the errors W - Ŵ.

    Column k is rounded from wₖ + Σ (wⱼ - ŵⱼ) Aⱼₖ over j < k, where H = (A + I) D (A + I)ᵀ. This equals GPTQ's updates
    by the inverse of H (theorem 6 of QuIP, arXiv 2307.13304), without the inverse. Of A [K, K] only the part above the
    diagonal is read.
    """
    value_dtype = get_format(columns.args.format).value_dtype
    Q, errors = torch.empty_like(R, dtype=value_dtype), R.to(product_dtype)
    for block in panels(len(R), block_size):
        before = A[: block.stop, block].to(R.device)
        target = plus_product(R[block], before[: block.start].T, errors[: block.start])
        round_columns(target, R[block], before[block.start :], columns.grid(block))
        Q[block], errors[block] = target, R[block]
    return Q


def sweep(
    Q: Tensor, R: Tensor, H: Tensor, columns: OrderedColumns, block_size: int, product_dtype: torch.dtype
) -> None:
    """Do one round of coordinate descent on tr(R H Rᵀ), column by column given all others; change Q and R in place.

    Args:
        Q: values of the format [K, N].
        R: W - Ŵ [K, N].
        H: symmetric [K, K].
        columns: the grids of the columns.
        block_size: the number of columns between two products with all of H.
        product_dtype: the dtype to which the operands of these products are rounded.
    """
    errors = R.to(product_dtype)
    for block in panels(len(R), block_size):
        grid, rows = columns.grid(block), H[block].to(R.device)
        change, diagonal = grid.value(Q[block]), rows[:, block].diagonal()
        target = change + rows.to(errors) @ errors / diagonal[:, None]
        round_columns(target, change, rows[:, block] / diagonal, grid)
        Q[block] = target
        R[block] += change
        errors[block] = R[block]


def round_columns(target: Tensor, reference: Tensor, feedback: Tensor, grid: QParams) -> None:
    """Overwrite the target [b, N] with values q of the format, and the reference with e = reference - value(q).

    Args:
        target: column k is rounded from targetₖ + Σ eⱼ feedbackⱼₖ over j < k.
        reference: the columns from which errors are counted, [b, N].
        feedback: [b, b], of which only the part above the diagonal is read.
        grid: the grid of these columns.
    """
    RecursiveUpdate(target, reference, feedback, grid).run(slice(0, len(target)))


@dataclass(frozen=True)
class RecursiveUpdate:
    """The arguments of `round_columns`."""

    target: Tensor
    reference: Tensor
    feedback: Tensor
    grid: QParams

    def run(self, part: slice) -> None:
        """Round one half of some columns, then the other half, which is moved by the errors of the first."""
        on_kernel = ops.on_kernels(self.target) and get_format(self.grid.args.format).element == "int"
        if part.stop - part.start <= (ops.LARGEST_PANEL if on_kernel else LEAF_COLUMNS):
            return self.round_panel(part) if on_kernel else self.round_leaf(part)
        middle = (part.start + part.stop) // 2
        first, second = slice(part.start, middle), slice(middle, part.stop)
        self.run(first)
        self.target[second].addmm_(self.feedback[first, second].T, self.reference[first])
        return self.run(second)

    def round_panel(self, part: slice) -> None:
        """Round a few columns by one kernel."""
        grid = (self.grid.scale[part], None if self.grid.zero_point is None else self.grid.zero_point[part])
        panel = (self.target[part], self.reference[part], self.feedback[part, part])
        ops.round_columns(*panel, *grid, self.grid.args.num_bits)

    def round_leaf(self, part: slice) -> None:
        """Round a few columns, each of which is moved by the errors of all before it."""
        feedback, errors, args = self.feedback[part, part].T.contiguous(), self.reference[part].T, self.grid.args
        number_format = get_format(args.format)
        zeros = [None] * len(feedback) if self.grid.zero_point is None else self.grid.zero_point[part].unbind()
        rows = (x[part].unbind() for x in (self.target, self.reference, self.grid.scale))
        for k, (w, e, scale, zero) in enumerate(zip(*rows, zeros, strict=True)):
            w.addmv_(errors[:, :k], feedback[k, :k]).div_(scale)
            q = number_format.round(w if zero is None else w.add_(zero), args, out=w)
            e.addcmul_(q if zero is None else q - zero, scale, value=-1)
