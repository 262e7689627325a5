"""These products of many tokens have one scale for each channel: W8A8, W4A8 and W4A4."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantize.kernels.config import Config
from quantize.kernels.packed import PackedWeight, QuantizedActivations
from quantize.kernels.tiles import accumulate, correction, rows_of, store_scaled, tile_of


@triton.jit
def gemm_kernel(
    y: tl.tensor, w: tl.tensor, a: tl.tensor,
    w_scale: tl.tensor, zero_w: tl.tensor, w_sum: tl.tensor, high_sum: tl.tensor,
    a_scale: tl.tensor, zero_a: tl.tensor, a_sum: tl.tensor, low_sum: tl.tensor, bias: tl.tensor,
    M: tl.tensor, N: tl.tensor, steps: tl.tensor, w_stride: tl.tensor, a_stride: tl.tensor,
    VARIANT: tl.constexpr, ASM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPAN: tl.constexpr,
) -> None:  # fmt: skip
    """A program computes one tile of Y [M, N].

    The sum starts from the corrections, because after the loop they would need the registers that hold the sum.
    """
    m, n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    w, a = rows_of(w, a, n, m, N, M, w_stride, a_stride)
    acc = correction(n, m, M, N, zero_w, w_sum, high_sum, zero_a, a_sum, low_sum, VARIANT)
    acc = accumulate(acc, w, a, 0, steps, SPAN, VARIANT, ASM)
    store_scaled(acc, y, m, n, M, N, w_scale, a_scale, bias)


def channel_arguments(qa: QuantizedActivations, pw: PackedWeight, bias: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the arguments of kernels for one scale a channel, in their order."""
    weight = (pw.data, qa.q, pw.scale, pw.zero_point, pw.weight_sum, pw.high_sum)
    return *weight, qa.scale, qa.zero_point, qa.sum, qa.low_sum, bias


def sizes(qa: QuantizedActivations, pw: PackedWeight, config: Config) -> tuple[int, int, int, int, int]:
    """Return M, N, iterations over K, and the bytes of a row of weights and of activations.

    Raises:
        ValueError: the operands and the configuration do not fit each other.
    """
    wanted = {"pair": ("w4", "pair"), "bytes": ("w8", "int8")}.get(config.variant, ("w4", "int8"))
    if (pw.layout, qa.layout) != wanted:
        raise ValueError(f"{config.variant} multiplies {wanted}, not {(pw.layout, qa.layout)}")
    (M, a_stride), (N, w_stride) = qa.q.shape, pw.data.shape
    if a_stride % config.block_k or a_stride != w_stride * (2 if pw.layout == "w4" else 1):
        raise ValueError(f"rows of {a_stride} and {w_stride} bytes do not fit, or are no multiple of {config.block_k}")
    if pw.zero_point is not None and qa.sum.shape[1] != len(pw.zero_point):
        raise ValueError(
            f"{len(pw.zero_point)} zero points of a channel need as many sums of a token, not {qa.sum.shape[1]}"
        )
    return M, N, a_stride // config.block_k, w_stride, a_stride


def launch(
    qa: QuantizedActivations, pw: PackedWeight, bias: Tensor | None, out_dtype: torch.dtype, config: Config
) -> Tensor:
    """Compute Y [M, N] = X Wᵀ + bias in `out_dtype`; the integers are summed exactly.

    Args:
        qa: the activations; for asymmetric weights they need one sum for each token.
        pw: weights with one scale for each channel.
        bias: [N] or None.
        out_dtype: float16, bfloat16 or float32.
        config: a configuration with `split_k` = 1.

    Raises:
        ValueError: the operands and the configuration do not fit each other.
    """
    M, N, *rest = sizes(qa, pw, config)
    y = torch.empty((M, N), dtype=out_dtype, device=qa.q.device)
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    if tiles:
        gemm_kernel[(tiles,)](
            y, *channel_arguments(qa, pw, bias), M, N, *rest,
            VARIANT=config.variant, ASM=config.asm, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            SPAN=config.block_k // 2, **config.options(),
        )  # fmt: skip
    return y
