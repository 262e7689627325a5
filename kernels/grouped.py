"""These products have a scale for each group of columns: each group is summed exactly, scaled, and added up.

Groups have 32, 64 or a multiple of 128 columns. Group scales of 8 bits (`prepack.two_levels`) are read as such, which
are a quarter of the bytes. Activations are in natural order, also those of 4 bits, because pairs would mix the groups
of a block.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantize.kernels.config import Config
from quantize.kernels.gemm import sizes
from quantize.kernels.packed import HALF, PackedWeight, QuantizedActivations
from quantize.kernels.prepack import supported
from quantize.kernels.split_k import is_last, own_part, part_of, sum_of_parts, workspace
from quantize.kernels.tiles import operands, rows_of, store_scaled, tile_of


@triton.jit
def add_group(
    total: tl.tensor, weighted: tl.tensor, acc: tl.tensor, group: tl.tensor, n: tl.tensor, m: tl.tensor,
    N: tl.tensor, M: tl.tensor, G: tl.tensor, stride: tl.tensor,
    group_scale: tl.tensor, zero_w: tl.tensor, w_sum: tl.tensor, a_sum: tl.tensor, VARIANT: tl.constexpr,
) -> Any:  # fmt: skip
    """Add the scaled sum of one group to `total` [BLOCK_N, BLOCK_M], and its scaled weights to `weighted` [BLOCK_N].

    A last block may be half full; then its second group does not exist, and adds nothing. What is stored by groups has
    `stride` channels in each.
    """
    at, here = group * stride + n, n < tl.where(group < G, N, 0)
    factor: tl.constexpr = 1 if VARIANT == "bytes" else 16  # in the sum; the scale absorbs a power of two exactly
    if zero_w is not None:
        sums = tl.load(a_sum + m * G + group, mask=m < tl.where(group < G, M, 0), other=0)
        acc -= (factor * tl.load(zero_w + at, mask=here, other=0))[:, None] * sums[None, :]
    scale = tl.load(group_scale + at, mask=here, other=0).to(tl.float32)
    weighted += scale * tl.load(w_sum + at, mask=here, other=0).to(tl.float32)
    return total + acc.to(tl.float32) * (scale * (1.0 / factor))[:, None], weighted


@triton.jit
def sum_groups(
    w: tl.tensor, a: tl.tensor, start: tl.tensor, stop: tl.tensor, n: tl.tensor, m: tl.tensor,
    N: tl.tensor, M: tl.tensor, G: tl.tensor, stride: tl.tensor,
    group_scale: tl.tensor, zero_w: tl.tensor, w_sum: tl.tensor, a_sum: tl.tensor, zero_a: tl.tensor,
    VARIANT: tl.constexpr, ASM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPAN: tl.constexpr,
    GROUP: tl.constexpr, UNROLL: tl.constexpr,
) -> Any:  # fmt: skip
    """Return Σ scale · (q_w - zero_w)(q_a - zero_a) over the steps start to stop, float32 [BLOCK_N, BLOCK_M].

    A step is UNROLL groups of 128 or more, so that what it reads of a row is long enough for the memory, or a span of
    bytes. The other arguments are those of `add_group`.
    """
    total, weighted = tl.zeros((BLOCK_N, BLOCK_M), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    none = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for step in range(start, stop):
        if GROUP >= 128:
            for part in tl.static_range(UNROLL):
                acc, group = none, step * UNROLL + part
                for block in tl.static_range(GROUP // 128):
                    w_low, a_low, w_high, a_high = operands(w, a, group * (GROUP // 128) + block, SPAN, VARIANT, ASM)
                    acc = tl.dot(w_low, a_low, acc, out_dtype=tl.int32)
                    acc = tl.dot(w_high, a_high, acc, out_dtype=tl.int32)
                total, weighted = add_group(
                    total, weighted, acc, group, n, m, N, M, G, stride, group_scale, zero_w, w_sum, a_sum, VARIANT
                )
        else:
            w_low, a_low, w_high, a_high = operands(w, a, step, SPAN, VARIANT, ASM)
            group = step * SPAN // 64 * (128 // GROUP) + step * SPAN % 64 // GROUP
            acc = tl.dot(w_low, a_low, none, out_dtype=tl.int32)
            total, weighted = add_group(
                total, weighted, acc, group, n, m, N, M, G, stride, group_scale, zero_w, w_sum, a_sum, VARIANT
            )
            acc = tl.dot(w_high, a_high, none, out_dtype=tl.int32)
            second = group + 64 // GROUP
            total, weighted = add_group(
                total, weighted, acc, second, n, m, N, M, G, stride, group_scale, zero_w, w_sum, a_sum, VARIANT
            )
    of_token = tl.load(zero_a + m, mask=m < M, other=0).to(tl.float32)
    return total - weighted[:, None] * of_token[None, :]


@triton.jit
def grouped_kernel(
    y: tl.tensor, parts: tl.tensor, counters: tl.tensor, w: tl.tensor, a: tl.tensor,
    w_scale: tl.tensor, group_scale: tl.tensor, zero_w: tl.tensor, w_sum: tl.tensor,
    a_scale: tl.tensor, zero_a: tl.tensor, a_sum: tl.tensor, bias: tl.tensor,
    M: tl.tensor, N: tl.tensor, G: tl.tensor, steps: tl.tensor, w_stride: tl.tensor, a_stride: tl.tensor,
    VARIANT: tl.constexpr, ASM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPAN: tl.constexpr,
    GROUP: tl.constexpr, UNROLL: tl.constexpr, SPLIT_K: tl.constexpr,
) -> None:  # fmt: skip
    """A program computes a part of K of one tile of Y [M, N]."""
    m, n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    w, a = rows_of(w, a, n, m, N, M, w_stride, a_stride)
    start, stop = part_of(steps, SPLIT_K)
    total = sum_groups(
        w, a, start, stop, n, m, N, M, G, N, group_scale, zero_w, w_sum, a_sum, zero_a,
        VARIANT, ASM, BLOCK_M, BLOCK_N, SPAN, GROUP, UNROLL,
    )  # fmt: skip
    if SPLIT_K > 1:
        own = own_part(parts, BLOCK_N, BLOCK_M, SPLIT_K)
        tl.store(own + tl.program_id(1) * BLOCK_N * BLOCK_M, total)
        if not is_last(counters, SPLIT_K):
            return
        total = sum_of_parts(own, SPLIT_K, BLOCK_N * BLOCK_M)
    store_scaled(total, y, m, n, M, N, w_scale, a_scale, bias)


def launch(
    qa: QuantizedActivations, pw: PackedWeight, bias: Tensor | None, out_dtype: torch.dtype, config: Config
) -> Tensor:
    """Compute `gemm.launch` for weights in groups and activations in natural order.

    The sum over groups is in float32, in an order that depends only on `config.split_k`. For asymmetric weights the
    activations need a sum for each group.

    Raises:
        ValueError: the operands and the configuration do not fit each other.
    """
    M, N, _, *strides = sizes(qa, pw, config)
    if (
        pw.group_scale is None
        or not supported(pw.columns, pw.group_size, 4)
        or config.variant not in ("shift", "bytes")
    ):
        raise ValueError(f"no grouped kernel for groups of {pw.group_size} columns as {config.variant}")
    y = torch.empty((M, N), dtype=out_dtype, device=qa.q.device)
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    if tiles:
        parts = workspace(tiles, config, torch.float32, pw)
        span = min(pw.group_size, HALF)
        steps = qa.q.shape[1] // max(pw.group_size, 2 * span)
        unroll = gcd(max(1, config.block_k // pw.group_size), steps) if pw.group_size >= 128 else 1
        weight = (pw.data, qa.q, pw.scale, pw.group_scale, pw.zero_point, pw.weight_sum)
        grouped_kernel[(tiles, config.split_k)](
            y, parts, pw.counters, *weight, qa.scale, qa.zero_point, qa.sum, bias,
            M, N, pw.group_scale.shape[0], steps // unroll, *strides,
            VARIANT=config.variant, ASM=config.asm, BLOCK_M=config.block_m, BLOCK_N=config.block_n, SPAN=span,
            GROUP=pw.group_size, UNROLL=unroll, SPLIT_K=config.split_k, **config.options(),
        )  # fmt: skip
    return y
