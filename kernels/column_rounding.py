"""GPTQ's columns are rounded in turn by one launch for a panel: rows are independent, so each program has some rows.

In plain torch each column takes some eight launches, whose latency is nearly all of the time on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quantize.kernels.activation_tile import round_half_even
from quantize.kernels.config import LARGEST_PANEL
from quantize.kernels.reference import integer_range

ROWS, WARPS = 64, 4


@triton.jit
def column_rounding_kernel(
    target: tl.tensor, reference: tl.tensor, feedback: tl.tensor, scale: tl.tensor, zero_point: tl.tensor,
    N: tl.tensor, columns: tl.tensor,
    QMIN: tl.constexpr, QMAX: tl.constexpr, PANEL: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """A program rounds all columns of some rows; column k is moved by the errors of the columns before it."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    before = tl.arange(0, PANEL)
    errors = tl.zeros((PANEL, ROWS), tl.float32)
    for k in range(columns):
        at, inside = k * N + n, n < N
        influence = tl.load(feedback + k * columns + before, mask=before < k, other=0.0)
        w = tl.load(target + at, mask=inside, other=0.0) + tl.sum(errors * influence[:, None], axis=0)
        s = tl.load(scale + at, mask=inside, other=1.0)
        t = tl.div_rn(w, s)
        z = tl.zeros((ROWS,), tl.float32)
        if zero_point is not None:
            z = tl.load(zero_point + at, mask=inside, other=0.0)
        q = round_half_even(tl.clamp(t + z, QMIN * 1.0, QMAX * 1.0)).to(tl.float32)
        e = tl.load(reference + at, mask=inside, other=0.0) - (q - z) * s
        tl.store(target + at, q, mask=inside)
        tl.store(reference + at, e, mask=inside)
        errors = tl.where((before == k)[:, None], e[None, :], errors)


def launch(
    target: Tensor, reference: Tensor, feedback: Tensor, scale: Tensor, zero_point: Tensor | None, num_bits: int
) -> None:
    """Overwrite the target with integers q, half to even, and the reference with e = reference - (q - z) · s.

    Args:
        target: float32 [b, N], contiguous; column k is rounded from targetₖ + Σ eⱼ feedbackⱼₖ over j < k.
        reference: float32 [b, N], contiguous; the columns from which errors are counted.
        feedback: float32 [b, b], of which only the part above the diagonal is read.
        scale: float32 [b, N].
        zero_point: float32 [b, N] or None.
        num_bits: the bits of q.

    Raises:
        ValueError: there are more columns than `LARGEST_PANEL`.
    """
    columns, N = target.shape
    if columns > LARGEST_PANEL:
        raise ValueError(f"{columns} columns are more than {LARGEST_PANEL}")
    if N:
        column_rounding_kernel[(triton.cdiv(N, ROWS),)](
            target, reference, feedback.T.contiguous(), scale, zero_point, N, columns,
            *integer_range(num_bits), PANEL=LARGEST_PANEL, ROWS=ROWS, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
