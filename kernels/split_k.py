"""For few tokens and one scale a channel, K is split in parts, so that enough programs read the weights at once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantize.kernels.config import Config
from quantize.kernels.gemm import channel_arguments, sizes
from quantize.kernels.packed import PackedWeight, QuantizedActivations
from quantize.kernels.tiles import accumulate, correction, rows_of, store_scaled, tile_of


@triton.jit
def part_of(steps: tl.tensor, SPLIT_K: tl.constexpr) -> Any:
    """Return the first step of a program's part of K, and the step after its last."""
    length = tl.cdiv(steps, SPLIT_K)
    start = tl.program_id(1) * length
    return start, tl.minimum(start + length, steps)


@triton.jit
def own_part(parts: tl.tensor, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, SPLIT_K: tl.constexpr) -> Any:
    """Return pointers to the first part of this program's tile, [BLOCK_N, BLOCK_M]; the others follow without gaps."""
    tile = tl.program_id(0).to(tl.int64) * SPLIT_K * BLOCK_N * BLOCK_M
    return parts + tile + (tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :])


@triton.jit
def is_last(counters: tl.tensor, SPLIT_K: tl.constexpr) -> Any:
    """Count this program among those of its tile; the last one finds all parts written, and resets the counter to 0."""
    tl.debug_barrier()  # all threads have stored their share of the part
    counter = counters + tl.program_id(0)
    last = tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT_K - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def sum_of_parts(own: tl.tensor, SPLIT_K: tl.constexpr, SIZE: tl.constexpr) -> Any:
    """Sum the parts, always in the same order, past the first cache, which other programs' stores do not reach."""
    total = tl.load(own, cache_modifier=".cg")
    for part in tl.static_range(1, SPLIT_K):
        total += tl.load(own + part * SIZE, cache_modifier=".cg")
    return total


@triton.jit
def split_k_kernel(
    y: tl.tensor, parts: tl.tensor, counters: tl.tensor, w: tl.tensor, a: tl.tensor,
    w_scale: tl.tensor, zero_w: tl.tensor, w_sum: tl.tensor, high_sum: tl.tensor,
    a_scale: tl.tensor, zero_a: tl.tensor, a_sum: tl.tensor, low_sum: tl.tensor, bias: tl.tensor,
    M: tl.tensor, N: tl.tensor, steps: tl.tensor, w_stride: tl.tensor, a_stride: tl.tensor,
    VARIANT: tl.constexpr, ASM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPAN: tl.constexpr,
    SPLIT_K: tl.constexpr,
) -> None:  # fmt: skip
    """A program computes one part of K of one tile of Y [M, N]; the last program of the tile finishes it."""
    m, n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    w, a = rows_of(w, a, n, m, N, M, w_stride, a_stride)
    start, stop = part_of(steps, SPLIT_K)
    acc = accumulate(tl.zeros((BLOCK_N, BLOCK_M), tl.int32), w, a, start, stop, SPAN, VARIANT, ASM)
    if SPLIT_K > 1:
        own = own_part(parts, BLOCK_N, BLOCK_M, SPLIT_K)
        tl.store(own + tl.program_id(1) * BLOCK_N * BLOCK_M, acc)
        if not is_last(counters, SPLIT_K):
            return
        acc = sum_of_parts(own, SPLIT_K, BLOCK_N * BLOCK_M)
    acc += correction(n, m, M, N, zero_w, w_sum, high_sum, zero_a, a_sum, low_sum, VARIANT)
    store_scaled(acc, y, m, n, M, N, w_scale, a_scale, bias)


def workspace(tiles: int, config: Config, dtype: torch.dtype, pw: PackedWeight) -> Tensor:
    """Allocate memory for the parts of all tiles.

    Raises:
        ValueError: there are more tiles than the weight has counters.
    """
    if config.split_k > 1 and tiles > len(pw.counters):
        raise ValueError(f"{tiles} tiles are split, but {len(pw.counters)} is the most; use split_k = 1")
    size = tiles * config.split_k * config.block_m * config.block_n if config.split_k > 1 else 0
    return torch.empty(size, dtype=dtype, device=pw.data.device)


def launch(
    qa: QuantizedActivations, pw: PackedWeight, bias: Tensor | None, out_dtype: torch.dtype, config: Config
) -> Tensor:
    """Compute `gemm.launch` with K in `config.split_k` parts, whose number does not change a bit of the result."""
    M, N, *rest = sizes(qa, pw, config)
    y = torch.empty((M, N), dtype=out_dtype, device=qa.q.device)
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    if tiles:
        parts = workspace(tiles, config, torch.int32, pw)
        split_k_kernel[(tiles, config.split_k)](
            y, parts, pw.counters, *channel_arguments(qa, pw, bias), M, N, *rest,
            VARIANT=config.variant, ASM=config.asm, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            SPAN=config.block_k // 2, SPLIT_K=config.split_k, **config.options(),
        )  # fmt: skip
    return y
