"""A linear with packed weights and activations in floating point (W4A16, W8A16) is one operator of torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantize.kernels import engine
from quantize.kernels.config import architecture, choose_config
from quantize.kernels.packing import unpack_int4
from quantize.kernels.reference import dequantize

MANY_TOKENS = 256  # from so many on the weight is first dequantized, and then multiplied by the vendor's library


@torch.library.custom_op("quantize_model::weight_only_linear", mutates_args=())
def weight_only_linear(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    levels: Tensor | None,
    bias: Tensor | None,
    num_bits: int,
) -> Tensor:
    """Compute X Wᵀ + bias with W = (q - z) · s, [M, K] → [M, N] in the dtype of x.

    Args:
        x: float16, bfloat16 or float32.
        data: uint8 [N, ⌈K / 2⌉] of `pack_int4` for 4 bits, int8 [N, K] for 8.
        scale: float32 [G, N] for G equal groups of columns, so that a kernel reads those of neighbours together.
        zero_point: int8 [G, N], float16 for levels beside zero, or None for symmetric weights.
        levels: float32 [16], the values of 4-bit codes, which then stand for q; None for integers.
        bias: [N] or None.
        num_bits: 4 or 8.
    """
    if engine.runs_on_triton(x):
        from quantize.kernels import weight_only_gemm

        if len(x) >= MANY_TOKENS:
            W = weight_only_gemm.dequantize(data, scale, zero_point, levels, num_bits, x.shape[1], x.dtype)
            return torch.nn.functional.linear(x, W, None if bias is None else bias.to(x.dtype))
        config = choose_config(len(x), len(data), x.shape[1], "w4a16", architecture(x.device))
        return weight_only_gemm.launch(x.contiguous(), data, scale, zero_point, levels, bias, num_bits, config)
    q = unpack_int4(data, x.shape[1]) if num_bits == 4 else data
    q = q if levels is None else levels[(q & len(levels) - 1).int()]
    W = dequantize(q, scale.T, None if zero_point is None else zero_point.T).to(x.dtype)
    return torch.nn.functional.linear(x, W, None if bias is None else bias.to(x.dtype))


@weight_only_linear.register_fake
def _(x: Tensor, data: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], data.shape[0]))
