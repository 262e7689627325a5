"""A linear with runtime smooth, from maxima to product, is one operator of torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantize.kernels import engine
from quantize.kernels.config import Config
from quantize.kernels.packed import BLOCK, pack_nibbles, pad_columns, unpack_nibbles
from quantize.kernels.prologue import Prologue
from quantize.kernels.runtime_smooth import runtime_smooth_linear, sorted_scales


def smooth_prepack(q: Tensor, scale: Tensor, zero_point: Tensor | None, num_bits: int) -> list[Tensor | None]:
    """Return data, scale and zero point of a weight of one scale a row, as `smooth_linear` reads them.

    Args:
        q: int8 [N, K].
        scale: [N, 1].
        zero_point: int8 [N, 1], or None for symmetric weights.
        num_bits: 4, or up to 8 in whole bytes.

    Returns:
        int8 [K, N' / 2] of `pack_nibbles` of qᵀ, or [K, N'], where N' is N padded to blocks of 128; float32 [N]; int32
        [N] or None.
    """
    data = (pack_nibbles if num_bits == 4 else pad_columns)(q.T).contiguous()
    return [data, scale[:, 0].float().contiguous(), None if zero_point is None else zero_point[:, 0].int()]


@torch.library.custom_op("quantize_model::smooth_linear", mutates_args=())
def smooth_linear(
    x: Tensor, data: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, weight_bits: int,
    num_bits: int, symmetric: bool, clip_ratio: float, group_size: int, normalize_tokens: bool, hadamard: int,
) -> Tensor:  # fmt: skip
    """Compute `runtime_smooth_linear` of [M, K] → [M, N] in the dtype of x.

    Args:
        x: float16, bfloat16 or float32.
        data: the weight, with scale and zero point, from `smooth_prepack`.
        scale: float32 [N].
        zero_point: int32 [N] or None.
        bias: [N] or None.
        weight_bits: the bits of the weights, as in `smooth_prepack`.
        num_bits: the bits of the activations.
        symmetric: whether the activations' zero point is fixed at 0.
        clip_ratio: the part of a token's range that its grid spans.
        group_size: the number of channels that share a scale.
        normalize_tokens: as in `smooth_scales`.
        hadamard: the order of a Hadamard transform in front, as in `Prologue`; 0 for none.
    """
    smooth, grid = (group_size, normalize_tokens), (num_bits, symmetric, clip_ratio)
    if engine.runs_on_triton(x):
        return on_triton(x, (data, scale, zero_point, weight_bits == 4), bias, *grid, *smooth, hadamard)
    q = unpack_nibbles(data, len(scale)) if weight_bits == 4 else data[:, : len(scale)]
    zeros = None if zero_point is None else zero_point[:, None].to(torch.int8)
    rotated = Prologue(hadamard=hadamard).applied(x).to(x.dtype)
    return runtime_smooth_linear(rotated, q.T, scale[:, None], zeros, bias, *grid, *smooth)


@smooth_linear.register_fake
def _(x: Tensor, _: Tensor, scale: Tensor, *__: Any) -> Tensor:
    return x.new_empty((x.shape[0], scale.shape[0]))


def tile_columns(group_size: int) -> int:
    """Return the number of columns of a K tile, which share a scalar, or 0 if no kernel has such groups."""
    columns = min(group_size & -group_size, BLOCK)
    return columns if columns >= 32 else 0


def on_triton(
    x: Tensor, weight: tuple[Tensor, Tensor, Tensor | None, bool], bias: Tensor | None,
    num_bits: int, symmetric: bool, clip_ratio: float, group_size: int, normalize_tokens: bool, hadamard: int,
) -> Tensor:  # fmt: skip
    """Run `smooth_linear` on the GPU; q - zero_point fits into a byte for up to 7 bits, and 8 bits keep them apart."""
    from quantize.kernels import smooth_gemm, smooth_maxima, token_quantizer

    x, maxima = smooth_maxima.launch(x, normalize_tokens, hadamard)
    order, s = sorted_scales(maxima, group_size)
    span, fold = tile_columns(group_size), not symmetric and num_bits < 8
    prologue = Prologue(order=order, smooth=s)
    qx = token_quantizer.launch(x, num_bits, symmetric, clip_ratio, "int8", span, prologue, fold)
    few = x.shape[0] <= 16
    config = Config(16, 64, num_warps=4, num_stages=4) if few else Config(32, 128, num_warps=4, num_stages=3)
    return smooth_gemm.launch(qx, *weight, order, s, span, not symmetric and not fold, bias, x.dtype, config)
