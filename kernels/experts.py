"""Products of a mixture of experts take one launch: rows are sorted by expert, and each meets its expert's weight.

The weights of E experts are one `PackedWeight` of E · N channels, expert by expert. A tile of tokens belongs to one
expert, so with few tokens most of a tile is empty, and what counts is that each expert's weight is read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantize.kernels.config import Config
from quantize.kernels.gemm import sizes
from quantize.kernels.grouped import sum_groups
from quantize.kernels.packed import HALF, PackedWeight, QuantizedActivations
from quantize.kernels.prepack import supported
from quantize.kernels.tiles import accumulate, correction, rows_of, store_scaled


@triton.jit
def experts_kernel(
    y: tl.tensor, w: tl.tensor, a: tl.tensor,
    w_scale: tl.tensor, group_scale: tl.tensor, zero_w: tl.tensor, w_sum: tl.tensor, high_sum: tl.tensor,
    a_scale: tl.tensor, zero_a: tl.tensor, a_sum: tl.tensor, low_sum: tl.tensor, bias: tl.tensor,
    expert_of: tl.tensor, first_of: tl.tensor, ends: tl.tensor, tiles: tl.tensor,
    N: tl.tensor, G: tl.tensor, channels: tl.tensor, steps: tl.tensor, w_stride: tl.tensor, a_stride: tl.tensor,
    VARIANT: tl.constexpr, ASM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPAN: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:  # fmt: skip
    """A program computes one tile of Y [M, N], whose rows are of one expert; neighbours read the same weights."""
    tile, tile_n = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    expert, first = tl.load(expert_of + tile), tl.load(first_of + tile)
    end = tl.load(ends + expert)
    if first >= end:
        return
    m, n = first + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    shift = expert.to(tl.int64) * N
    w_scale, w_sum = w_scale + shift, w_sum + shift
    if zero_w is not None:
        zero_w += shift
    if bias is not None:
        bias += shift
    w, a = rows_of(w + shift * w_stride, a, n, m, N, end, w_stride, a_stride)
    if GROUP:
        total = sum_groups(
            w, a, 0, steps, n, m, N, end, G, channels, group_scale + shift, zero_w, w_sum, a_sum, zero_a,
            VARIANT, ASM, BLOCK_M, BLOCK_N, SPAN, GROUP, 1,
        )  # fmt: skip
    else:
        acc = correction(n, m, end, N, zero_w, w_sum, high_sum + shift, zero_a, a_sum, low_sum, VARIANT)
        total = accumulate(acc, w, a, 0, steps, SPAN, VARIANT, ASM)
    store_scaled(total, y, m, n, end, N, w_scale, a_scale, bias)


def tiles_of(ends: Tensor, M: int, block_m: int) -> tuple[Tensor, Tensor]:
    """Return the expert and the first row of each tile of tokens, int32 [tiles], without a look at a number.

    There are as many tiles as M rows of any experts may need; those that are left over begin at their expert's end.

    Args:
        ends: int32 [E], the row behind each expert's last one.
        M: the number of rows.
        block_m: the rows of a tile.
    """
    starts = torch.nn.functional.pad(ends[:-1], (1, 0))
    needed = (ends - starts + block_m - 1) // block_m
    behind = needed.cumsum(0, dtype=torch.int32)
    tiles = torch.arange(M // block_m + min(len(ends), M), dtype=torch.int32, device=ends.device)
    expert = torch.searchsorted(behind, tiles, right=True, out_int32=True).clamp(max=len(ends) - 1)
    first = starts[expert] + (tiles - (behind - needed)[expert]) * block_m
    return expert, torch.minimum(first, ends[expert]).int()


def launch(
    qa: QuantizedActivations,
    pw: PackedWeight,
    ends: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    config: Config,
) -> Tensor:
    """Compute Y [M, N] = X Wₑᵀ + bₑ in `out_dtype`, where e is the expert of the row; integers are summed exactly.

    Args:
        qa: the activations of M rows, sorted by expert.
        pw: the weights of all experts [E · N, K], with one scale for each channel, or in groups.
        ends: int32 [E], the row behind each expert's last one; the last is M.
        bias: [E · N] or None.
        out_dtype: float16, bfloat16 or float32.
        config: a configuration with `split_k` = 1.

    Raises:
        ValueError: the operands and the configuration do not fit each other.
    """
    M, channels, steps, *strides = sizes(qa, pw, config)
    in_groups, span = pw.group_scale is not None, config.block_k // 2
    if in_groups:
        if not supported(pw.columns, pw.group_size, 4) or config.variant not in ("shift", "bytes"):
            raise ValueError(f"no kernel for experts in groups of {pw.group_size} columns as {config.variant}")
        span = min(pw.group_size, HALF)
        steps = qa.q.shape[1] // max(pw.group_size, 2 * span)
    if channels % len(ends):
        raise ValueError(f"{channels} channels are not those of {len(ends)} experts alike")
    N = channels // len(ends)
    y = torch.empty((M, N), dtype=out_dtype, device=qa.q.device)
    expert_of, first_of = tiles_of(ends, M, config.block_m)
    tiles = len(expert_of)
    if tiles:
        weight = (pw.data, qa.q, pw.scale, pw.group_scale, pw.zero_point, pw.weight_sum, pw.high_sum)
        experts_kernel[(tiles * triton.cdiv(N, config.block_n),)](
            y, *weight, qa.scale, qa.zero_point, qa.sum, qa.low_sum, bias, expert_of, first_of, ends, tiles,
            N, pw.weight_sum.shape[0], channels, steps, *strides,
            VARIANT=config.variant, ASM=config.asm, BLOCK_M=config.block_m, BLOCK_N=config.block_n, SPAN=span,
            GROUP=pw.group_size, **config.options(),
        )  # fmt: skip
    return y
