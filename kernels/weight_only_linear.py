"""A linear with integer weights and activations in floating point (W4A16, W8A16) is one operator of torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantize.kernels import engine
from quantize.kernels.config import Config
from quantize.kernels.packing import unpack_int4
from quantize.kernels.reference import dequantize

LARGEST_STEP, SMALLEST_STEP = 64, 16  # columns of an iteration; a matrix instruction takes at least 16
PROGRAMS = 256  # that should run at once where few tokens make few tiles
MOST_PARTS = 8


@torch.library.custom_op("quantize_model::weight_only_linear", mutates_args=())
def weight_only_linear(
    x: Tensor, data: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, num_bits: int
) -> Tensor:
    """Compute X Wᵀ + bias with W = (q - z) · s, [M, K] → [M, N] in the dtype of x.

    Args:
        x: float16, bfloat16 or float32.
        data: uint8 [N, ⌈K / 2⌉] of `pack_int4` for 4 bits, int8 [N, K] for 8.
        scale: float32 [N, G] for G equal groups of columns.
        zero_point: int8 [N, G], or None for symmetric weights.
        bias: [N] or None.
        num_bits: 4 or 8.
    """
    if engine.runs_on_triton(x):
        from quantize.kernels import weight_only_gemm

        config = choose_config(*x.shape, *scale.shape)
        return weight_only_gemm.launch(x.contiguous(), data, scale, zero_point, bias, num_bits, config)
    q = unpack_int4(data, x.shape[1]) if num_bits == 4 else data
    W = dequantize(q, scale, zero_point).to(x.dtype)
    return torch.nn.functional.linear(x, W, None if bias is None else bias.to(x.dtype))


@weight_only_linear.register_fake
def _(x: Tensor, data: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], data.shape[0]))


def step_of(columns: int, groups: int) -> int:
    """Return the columns of an iteration for weights in so many groups; below `SMALLEST_STEP` there is no kernel."""
    size = columns // groups if groups > 1 else LARGEST_STEP
    return min(LARGEST_STEP, size & -size)


def choose_config(M: int, K: int, N: int, G: int) -> Config:
    """Return the tile for M tokens and N channels of K columns in G groups, which has not been tuned on a GPU yet."""
    block_m, block_n = (16, 64) if M <= 16 else (32, 64) if M <= 32 else (64, 128)
    tiles, step = -(-M // block_m) * -(-N // block_n), step_of(K, G)
    parts = max(1, min(MOST_PARTS, PROGRAMS // max(tiles, 1), K // (4 * step)))
    return Config(block_m, block_n, step, parts if M <= 32 else 1, 4 if M <= 32 else 8, 4)
