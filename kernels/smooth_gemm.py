"""With runtime smooth, the integer sum of each K tile is multiplied by the tile's scalar.

Source: arXiv 2409.20361, section 3.2. The order of the channels changes from call to call. So weights are stored
channel by channel, and a tile gathers whole runs of output channels by the channel's number; the activations come
sorted from their quantizer.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantize.kernels.config import Config
from quantize.kernels.epilogue import store_output
from quantize.kernels.packed import HALF, LOW_OFFSET, QuantizedActivations

HALF_BLOCK: tl.constexpr = tl.constexpr(HALF)
OFFSET: tl.constexpr = tl.constexpr(LOW_OFFSET)


@triton.jit
def load_zeros(zero_point: tl.tensor, index: tl.tensor, length: tl.tensor) -> Any:
    """Load zero points int32 [n], or zeros if there are none."""
    if zero_point is None:
        return tl.zeros(index.shape, tl.int32)
    else:
        return tl.load(zero_point + index, mask=index < length, other=0)


@triton.jit
def add_tile(
    y: tl.tensor,
    product: tl.tensor,
    w: tl.tensor,
    scale: tl.tensor,
    zero_w: tl.tensor,
    sums: tl.tensor,
    zero_x: tl.tensor,
    count: tl.tensor,
    SHIFT: tl.constexpr,
) -> Any:
    """Add scale · Σ (x - zero_x)(w - zero_w) over a tile of `count` columns, from the product Σ x·w · 2^SHIFT."""
    centred = (product >> SHIFT) - zero_w[:, None] * sums[None, :]
    if zero_x is not None:
        w_sum = (tl.sum(w.to(tl.int32), axis=1) >> SHIFT) - zero_w * count
        centred -= w_sum[:, None] * zero_x[None, :]
    return y + centred.to(tl.float32) * scale[:, None]


@triton.jit
def smooth_gemm_kernel(
    q_ptr: tl.tensor,
    scale_x: tl.tensor,
    zero_x: tl.tensor,
    sum_ptr: tl.tensor,
    w_ptr: tl.tensor,
    scale_w: tl.tensor,
    zero_w: tl.tensor,
    order: tl.tensor,
    smooth: tl.tensor,
    bias: tl.tensor,
    y_ptr: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    q_stride: tl.tensor,
    w_stride: tl.tensor,
    tiles: tl.tensor,
    PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """A program computes the output channels of BYTES bytes of weights, two in each at 4 bits, for BLOCK_M tokens."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    n = byte // HALF_BLOCK * (2 * HALF_BLOCK) + byte % HALF_BLOCK if PACKED else byte
    n_high = n + HALF_BLOCK
    scale, scale_high = tl.load(scale_w + n, n < N, 0.0), tl.load(scale_w + n_high, n_high < N, 0.0)
    zero, zero_high = load_zeros(zero_w, n, N), load_zeros(zero_w, n_high, N)
    zeros_x = None if zero_x is None else load_zeros(zero_x, rows, M)
    y, y_high = tl.zeros((BYTES, BLOCK_M), tl.float32), tl.zeros((BYTES, BLOCK_M), tl.float32)
    for tile in range(0, tiles):
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        channel = tl.load(order + k, mask=k < K, other=0)
        w = tl.load(w_ptr + channel[None, :] * w_stride + byte[:, None], mask=(k < K)[None, :], other=0)
        x = tl.load(q_ptr + rows.to(tl.int64)[None, :] * q_stride + k[:, None], mask=(rows < M)[None, :], other=0)
        sums = tl.load(sum_ptr + rows * tiles + tile, mask=rows < M, other=0)
        s, count = tl.load(smooth + tile * BLOCK_K), tl.minimum(K - tile * BLOCK_K, BLOCK_K)
        if PACKED:
            low, high = w & 0x0F, w & -16
            y = add_tile(y, tl.dot(low, x), low, scale * s, zero + OFFSET, sums, zeros_x, count, 0)
            y_high = add_tile(y_high, tl.dot(high, x), high, scale_high * s, zero_high, sums, zeros_x, count, 4)
        else:
            y = add_tile(y, tl.dot(w, x), w, scale * s, zero, sums, zeros_x, count, 0)
    store_output(y_ptr, y, rows, n, M, N, scale_x, bias)
    if PACKED:
        store_output(y_ptr, y_high, rows, n_high, M, N, scale_x, bias)


def launch(
    x: QuantizedActivations,
    data: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    packed: bool,
    order: Tensor,
    smooth: Tensor,
    span: int,
    zero_points: bool,
    bias: Tensor | None,
    dtype: torch.dtype,
    config: Config,
) -> Tensor:
    """Compute `runtime_smooth.runtime_smooth_linear` from its quantized operands, on the GPU.

    Args:
        x: activations of the layout `int8`, sorted and smoothed, with the sums of every `span` columns.
        data: the weights in the order of the model, with scale and zero point from `smooth_linear.smooth_prepack`.
        scale: float32 [N].
        zero_point: int32 [N] or None.
        packed: whether two weights share a byte.
        order: int64 [K], from `runtime_smooth.sorted_scales`.
        smooth: float32 [K], from the same function.
        span: the number of columns of a K tile, 32, 64 or 128, which share a scale.
        zero_points: whether the zero points of x can be other than 0.
        bias: [N] or None.
        dtype: the dtype of the result.
        config: tile and launch parameters; `block_k`, `split_k` and `variant` are not used.

    Returns:
        [M, N].
    """
    (M, stride), (K, width), N = x.q.shape, data.shape, len(scale)
    y = torch.empty((M, N), dtype=dtype, device=x.q.device)
    block = config.block_n // 2 if packed else config.block_n  # bytes
    smooth_gemm_kernel[(triton.cdiv(M, config.block_m), width // block)](
        x.q, x.scale, x.zero_point if zero_points else None, x.sum, data, scale, zero_point, order, smooth, bias, y,
        M, N, K, stride, width, x.sum.shape[1], packed, config.block_m, block, span, **config.options(),
    )  # fmt: skip
    return y
