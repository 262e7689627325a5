"""A product in float32 whose tiles are [output channels, tokens] ends with scale, bias and a transposed store."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_output(
    y_ptr: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
) -> None:
    """Write yᵀ · scale + bias for the channels n and tokens `rows` that exist; scale [M] and bias [N] may be None."""
    if scale is not None:
        y *= tl.load(scale + rows, mask=rows < M, other=0.0)[None, :]
    if bias is not None:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    inside = (n < N)[:, None] & (rows < M)[None, :]
    tl.store(y_ptr + rows.to(tl.int64)[None, :] * N + n[:, None], y.to(y_ptr.dtype.element_ty), mask=inside)
