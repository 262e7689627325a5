"""A linear on FP4, quantizer and product, is one operator of torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantize.kernels import engine
from quantize.kernels.config import Config, architecture
from quantize.kernels.fp4 import decode_scale, unpack_fp4
from quantize.kernels.prologue import Prologue
from quantize.kernels.reference import quantized_linear


@torch.library.custom_op("quantize_model::fp4_linear", mutates_args=())
def fp4_linear(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    bias: Tensor | None,
    clip_ratio: float,
    hadamard: int,
) -> Tensor:
    """Compute `quantized_linear` with MXFP4 or NVFP4, [M, K] → [M, N] in the dtype of x.

    Args:
        x: float16, bfloat16 or float32.
        data: uint8 [N, K / 2] of `pack_fp4`.
        scale: uint8 [N, G], the bytes of `encode_scale`.
        global_scale: float32 [] for NVFP4, None for MXFP4.
        bias: [N] or None.
        clip_ratio: the part of a group's range that its grid spans.
        hadamard: the order of a Hadamard transform in front, as in `Prologue`; 0 for none.
    """
    prologue, group_size = Prologue(hadamard=hadamard), x.shape[1] // scale.shape[1]
    number_format = "mxfp4" if global_scale is None else "nvfp4"
    if engine.runs_on_triton(x):
        from quantize.kernels import fp4_gemm, fp4_quantizer

        qx = fp4_quantizer.launch(x, number_format, group_size, clip_ratio, prologue)
        return fp4_gemm.launch(
            qx, data, scale, global_scale, bias, x.dtype, *choose_fp4_config(len(x), architecture(x.device))
        )
    stored = scale if global_scale is None else scale.view(torch.float8_e4m3fn)
    weight = (unpack_fp4(data, x.shape[1]), decode_scale(stored, global_scale), None, bias)
    rotated = prologue.applied(x).to(x.dtype)
    return quantized_linear(rotated, *weight, 4, True, clip_ratio, number_format, group_size)


@fp4_linear.register_fake
def _(x: Tensor, data: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], data.shape[0]))


def choose_fp4_config(M: int, arch: str) -> tuple[Config, bool]:
    """Return the tile of a product of M tokens, and whether NVFP4 does without `tl.dot_scaled`.

    A GPU without FP4 multiplies in half precision. Its operands take more registers, so its tiles are smaller. There
    `tl.dot_scaled` does not know scales in E4M3 (Triton 3.6 on sm_90).
    """
    if arch.startswith(("sm_10", "sm_12", "gfx95")):
        large = Config(128, 128, 256, num_warps=8, num_stages=3)
        return Config(16, 128, 256, num_warps=4, num_stages=4) if M <= 16 else large, False
    large = Config(64, 64, 128, num_warps=4, num_stages=3)
    return Config(16, 64, 128, num_warps=4, num_stages=4) if M <= 16 else large, True
