"""Activations are quantized to integers, with scale and zero point for each token, by one kernel with the steps before.

Codes equal those of `reference.quantize_per_token` bit for bit: IEEE divisions by the scale, rounded half to even.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantize.kernels.activation_tile import divided, inverse_rms_of, load_activations, round_half_even
from quantize.kernels.packed import BLOCK, HALF, HIGH_SHIFT, QuantizedActivations
from quantize.kernels.prologue import NOTHING, Prologue
from quantize.kernels.reference import integer_range

TINY: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).tiny)
SHIFT: tl.constexpr = tl.constexpr(HIGH_SHIFT)
HALF_BLOCK: tl.constexpr = tl.constexpr(HALF)


@triton.jit
def token_grid(low: tl.tensor, high: tl.tensor, QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr) -> Any:
    """Return scale float32 and zero point int32 of tokens: `reference.scale_and_zero_point` of low ≤ 0 and high ≥ 0."""
    span, steps = (tl.maximum(-low, high), QMAX) if SYMMETRIC else (high - low, QMAX - QMIN)
    scale = tl.div_rn(span, steps * 1.0)
    scale = tl.where(scale > TINY, scale, 1.0)
    zero_point = tl.zeros(low.shape, tl.int32)
    if not SYMMETRIC:
        zero_point = round_half_even(tl.clamp(QMIN - tl.div_rn(low, scale), QMIN * 1.0, QMAX * 1.0))
    return scale, zero_point


@triton.jit
def store_codes(
    q_ptr: tl.tensor,
    q: tl.tensor,
    rows: tl.tensor,
    start: tl.tensor,
    M: tl.tensor,
    padded: tl.tensor,
    PAIR: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> Any:
    """Store int32 codes [m, k] of whole blocks in their layout; return the sums [m] of codes that meet low nibbles."""
    BLOCKS: tl.constexpr = BLOCK_K // (2 * HALF_BLOCK)
    halves = tl.permute(tl.reshape(q, (q.shape[0], BLOCKS, 2, HALF_BLOCK)), (0, 1, 3, 2))
    first, second = tl.split(halves)
    low_sum = tl.sum(tl.sum(first, axis=2), axis=1)
    if PAIR:
        second -= SHIFT
        first = 16 * first - second
        q = tl.reshape(tl.permute(tl.join(first, second), (0, 1, 3, 2)), (q.shape[0], BLOCK_K))
    k = start + tl.arange(0, BLOCK_K)
    inside = (rows < M)[:, None] & (k < padded)[None, :]
    tl.store(q_ptr + rows.to(tl.int64)[:, None] * padded + k[None, :], q.to(tl.int8), mask=inside)
    return low_sum


@triton.jit(do_not_specialize=["epsilon", "clip_ratio"])
def token_quantizer_kernel(
    x_ptr: tl.tensor,
    q_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_point_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    low_sum_ptr: tl.tensor,
    gain: tl.tensor,
    order: tl.tensor,
    smooth: tl.tensor,
    M: tl.tensor,
    K: tl.tensor,
    padded: tl.tensor,
    stride: tl.tensor,
    groups: tl.tensor,
    epsilon: tl.tensor,
    clip_ratio: tl.tensor,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    FOLD: tl.constexpr,
    PAIR: tl.constexpr,
    GROUP: tl.constexpr,
    HADAMARD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """A program goes twice over the columns of BLOCK_M tokens: for the range, then for the codes and their sums."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inverse_rms = inverse_rms_of(x_ptr, gain, rows, M, K, stride, epsilon, BLOCK_K)
    low, high = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = load_activations(x_ptr, gain, order, smooth, inverse_rms, rows, k, M, K, stride, HADAMARD)
        low, high = tl.minimum(low, tl.min(x, axis=1)), tl.maximum(high, tl.max(x, axis=1))
    scale, zero_point = token_grid(low * clip_ratio, high * clip_ratio, QMIN, QMAX, SYMMETRIC)
    total, low_total = tl.zeros((BLOCK_M,), tl.int32), tl.zeros((BLOCK_M,), tl.int32)
    for start in range(0, padded, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = load_activations(x_ptr, gain, order, smooth, inverse_rms, rows, k, M, K, stride, HADAMARD)
        x = divided(x, scale[:, None]) + zero_point.to(tl.float32)[:, None]
        q = round_half_even(tl.clamp(x, QMIN * 1.0, QMAX * 1.0))
        if FOLD:
            q -= zero_point[:, None]
        q = tl.where(k[None, :] < K, q, 0)
        if GROUP:
            group = start // GROUP + tl.arange(0, BLOCK_K // GROUP)
            sums = tl.sum(tl.reshape(q, (BLOCK_M, BLOCK_K // GROUP, GROUP)), axis=2)
            inside = (rows < M)[:, None] & (group < groups)[None, :]
            tl.store(sum_ptr + rows.to(tl.int64)[:, None] * groups + group[None, :], sums, mask=inside)
        total += tl.sum(q, axis=1)
        low_total += store_codes(q_ptr, q, rows, start, M, padded, PAIR, BLOCK_K)
    tl.store(scale_ptr + rows, scale, mask=rows < M)
    tl.store(zero_point_ptr + rows, zero_point * 0 if FOLD else zero_point, mask=rows < M)
    tl.store(low_sum_ptr + rows, low_total, mask=rows < M)
    if not GROUP:
        tl.store(sum_ptr + rows, total, mask=rows < M)


def launch(
    x: Tensor,
    num_bits: int,
    symmetric: bool,
    clip_ratio: float,
    layout: str = "int8",
    group_size: int = 0,
    prologue: Prologue = NOTHING,
    fold: bool = False,
) -> QuantizedActivations:
    """Quantize activations on the GPU.

    Args:
        x: [M, K] with adjacent columns.
        num_bits: 2 to 8; 4 for the layout `pair`.
        symmetric: whether the zero point is fixed at 0.
        clip_ratio: the grid spans this part of a token's range, in (0, 1].
        layout: `int8` or `pair` (`kernels/packed.py`).
        group_size: the number of columns of each sum, a power of two (the last may have fewer); 0 means all.
        prologue: the steps that are done to x first.
        fold: whether q becomes q - zero_point and the zero points 0, for up to 7 bits in the layout `int8`.
    """
    M, K = x.shape
    padded = -(-K // BLOCK) * BLOCK
    groups = triton.cdiv(K, group_size) if group_size else 1
    q = torch.empty((M, padded), dtype=torch.int8, device=x.device)
    scale = torch.empty(M, dtype=torch.float32, device=x.device)
    zero_point, low_sum = (torch.empty(M, dtype=torch.int32, device=x.device) for _ in range(2))
    sums = torch.empty((M, groups), dtype=torch.int32, device=x.device)
    block_m, block_k = prologue.tile(M, padded, max(BLOCK, group_size))
    warps = 8 if block_k > 2048 else 4  # with 4 a row of 4096 would spill on sm_100
    token_quantizer_kernel[(triton.cdiv(M, block_m),)](
        x, q, scale, zero_point, sums, low_sum, *prologue.tensors(), M, K, padded, x.stride(0), groups,
        prologue.epsilon, clip_ratio, *integer_range(num_bits), symmetric, fold, layout == "pair",
        group_size, prologue.hadamard, block_m, block_k, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return QuantizedActivations(q, scale, zero_point, sums, low_sum, layout)
