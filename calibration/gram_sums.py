"""Products are summed over the rows of activations, a few rows of a total at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BLOCK = 512  # rows of a total that are summed together
FIRST = 512  # rows of activations that are summed before the next sum is forecast


def gram_factors(x: Tensor, float_reference: Tensor | None, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Return the factors [rows, K] that x [..., K] and x' add to a `Gram`: left ones, one a total, and a right one.

    They are rounded to `dtype`; sums of bfloat16 factors are compensated (`add_bf16_compensated`).
    """
    x = x.detach().reshape(-1, x.shape[-1])
    right = x.to(dtype)
    if float_reference is None:
        return [right], right
    return [right, (float_reference.detach().reshape(x.shape).float() - x.float()).to(dtype)], right


def row_panels(count: int) -> Iterator[slice]:
    """Yield runs of neighbouring rows of a total, on which several processes can work one behind the other."""
    return (slice(first, min(first + BLOCK, count)) for first in range(0, count, BLOCK))


def add_products(totals: Sequence[Tensor], lefts: Sequence[Tensor], right: Tensor, seen: int) -> None:
    """Add leftᵀ right to each total, float32 [K, K], as `add_product` does; `seen` rows have been summed before."""
    for total, left in zip(totals, lefts, strict=True):
        for rows in row_panels(len(total)):
            add_product(total, left, right, rows, seen)


def add_product(total: Tensor, left: Tensor, right: Tensor, rows: slice, seen: int) -> None:
    """Add leftᵀ right, both [n, K], to some rows of a total [K, K].

    If `left` is `right`, the product is symmetric: only what stands on and above the diagonal blocks is computed, and
    `fill_lower` copies the rest. A total in the machine's memory has these rows on the device of the factors meanwhile.
    """
    first = rows.start if left is right else 0
    here, left, right = total[rows, first:], left[:, rows].T, right[:, first:]
    part = here.to(right.device)
    add_to(part, left, right, seen)
    if part is not here:
        here.copy_(part)


def add_to(part: Tensor, left: Tensor, right: Tensor, seen: int) -> None:
    """Add the product of left [m, n] and right [n, K] to some rows [m, K] of a total."""
    if right.dtype == torch.float32:
        part.addmm_(left, right)
        return
    if right.is_cuda:  # products of bfloat16 are exact there, and summed in float32
        part.add_(torch.mm(left, right, out_dtype=torch.float32))
        return
    start = min(max(0, FIRST - seen), len(right))
    part.addmm_(left[:, :start].float(), right[:start].float())
    if start < len(right):
        add_bf16_compensated(part, left[:, start:], right[start:], seen + start)


def add_bf16_compensated(total: Tensor, left: Tensor, right: Tensor, seen: int) -> None:
    """Add a product that is rounded to bfloat16, after taking off what the total of the rows before forecasts.

    The forecast is added without rounding, so only the difference from it is rounded. If the rows are like those
    before, the difference is the smaller the more rows there were: in the end the error is some 1e-5 of the diagonal
    and not 1e-3.
    """
    difference = torch.empty_like(total, dtype=right.dtype)
    torch.mul(total, right.shape[0] / seen, out=difference)
    total.add_(difference)
    total.add_(difference.addmm_(left, right, beta=-1))


def fill_lower(total: Tensor) -> None:
    """Copy what stands above the diagonal blocks (of `row_panels`) of a symmetric total [K, K] to below them."""
    for rows in row_panels(len(total)):
        rest = slice(rows.stop, None)
        total[rest, rows] = total[rows, rest].T
