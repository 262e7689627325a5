"""Activations are quantized to FP4, in groups that share a scale, by one kernel with the steps in front.

Codes, scales and global scales equal those of `fp4.quantize_fp4` bit for bit, in the bytes of `pack_fp4` and
`encode_scale`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantize.kernels.activation_tile import divided, inverse_rms_of, load_activations, round_half_even
from quantize.kernels.fp4 import E4M3_LARGEST, E4M3_SMALLEST, LARGEST
from quantize.kernels.prologue import NOTHING, Prologue

TOP: tl.constexpr = tl.constexpr(LARGEST)
E4M3_BOTTOM: tl.constexpr = tl.constexpr(E4M3_SMALLEST)
E4M3_TOP: tl.constexpr = tl.constexpr(E4M3_LARGEST)
E4M3_BIAS_GAP: tl.constexpr = tl.constexpr(
    (127 - 7) << 3
)  # between exponents of float32 and E4M3, above 3 fraction bits
TINY: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class Fp4Activations:
    """Activations [M, K] in groups of K / G columns.

    Attributes:
        q: uint8 [M, K / 2], two codes in a byte, with the even column low.
        scale: uint8 [M, G]: E8M0 for MXFP4, the bits of E4M3 for NVFP4.
        global_scale: float32 [M] for NVFP4, None for MXFP4.
    """

    q: Tensor
    scale: Tensor
    global_scale: Tensor | None


@triton.jit
def e8m0_of(largest: tl.tensor) -> Any:
    """Return the scales' bytes, int32, of groups with these largest magnitudes, as in `fp4.fp4_scale` for MXFP4."""
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    return tl.where(largest == 0, 124, tl.maximum(exponent - 2, 1))  # frexp returns the exponent 0 for zero


@triton.jit
def e4m3_of(x: tl.tensor) -> Any:
    """Round float32 in [2^-9, 448] half to even to bytes int32: float32's own bits, or steps of 2^-9 below 2^-6."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - E4M3_BIAS_GAP
    return tl.where(x < 2.0**-6, round_half_even(tl.minimum(x, 1.0) * 2.0**9), normal)


@triton.jit
def e4m3_value(byte: tl.tensor) -> Any:
    """Return float32 of non-negative E4M3 given as int32, exactly."""
    normal = ((byte + E4M3_BIAS_GAP) << 20).to(tl.float32, bitcast=True)
    return tl.where(byte < 8, byte.to(tl.float32) * 2.0**-9, normal)


@triton.jit
def e2m1_of(x: tl.tensor) -> Any:
    """Return codes int32, sign | magnitude, of the nearest of ±{0, 1, 2, 3, 4, 6, 8, 12}, half to even, without -0."""
    size = tl.minimum(tl.abs(x), 12.0)
    upper, top = (size >= 4.0).to(tl.int32), (size >= 8.0).to(tl.int32)
    steps = size * (1.0 - 0.5 * upper.to(tl.float32) - 0.25 * top.to(tl.float32))  # of 1, 2 and 4
    code = round_half_even(steps) + 2 * (upper + top)
    return code | tl.where((x < 0) & (code > 0), 8, 0)


@triton.jit(do_not_specialize=["epsilon", "clip_ratio"])
def fp4_quantizer_kernel(
    x_ptr: tl.tensor,
    q_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    global_scale_ptr: tl.tensor,
    gain: tl.tensor,
    order: tl.tensor,
    smooth: tl.tensor,
    M: tl.tensor,
    K: tl.tensor,
    stride: tl.tensor,
    epsilon: tl.tensor,
    clip_ratio: tl.tensor,
    GROUP: tl.constexpr,
    HADAMARD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """A program goes over the columns of BLOCK_M tokens once, and for NVFP4 once before that for the global scale."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inverse_rms = inverse_rms_of(x_ptr, gain, rows, M, K, stride, epsilon, BLOCK_K)
    global_scale = tl.zeros((BLOCK_M,), tl.float32)
    if global_scale_ptr is not None:
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            x = load_activations(x_ptr, gain, order, smooth, inverse_rms, rows, k, M, K, stride, HADAMARD)
            global_scale = tl.maximum(global_scale, tl.max(tl.abs(x), axis=1))
        global_scale = tl.maximum(tl.div_rn(global_scale * clip_ratio, TOP * E4M3_TOP), TINY)
        tl.store(global_scale_ptr + rows, global_scale, mask=rows < M)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = load_activations(x_ptr, gain, order, smooth, inverse_rms, rows, k, M, K, stride, HADAMARD)
        x = tl.reshape(x, (BLOCK_M, BLOCK_K // GROUP, GROUP))
        largest = tl.max(tl.abs(x), axis=2) * clip_ratio
        if global_scale_ptr is not None:
            relative = tl.div_rn(tl.div_rn(largest, TOP), global_scale[:, None])
            byte = e4m3_of(tl.clamp(relative, E4M3_BOTTOM, E4M3_TOP))
            scale = e4m3_value(byte) * global_scale[:, None] / 2
        else:
            byte = e8m0_of(largest)
            scale = (byte << 23).to(tl.float32, bitcast=True) / 2
        code = tl.reshape(e2m1_of(divided(x, scale[:, :, None])), (BLOCK_M, BLOCK_K // 2, 2))
        low, high = tl.split(code)
        pair = start // 2 + tl.arange(0, BLOCK_K // 2)
        inside = (rows < M)[:, None] & (pair < K // 2)[None, :]
        tl.store(q_ptr + rows.to(tl.int64)[:, None] * (K // 2) + pair[None, :], (low | high << 4).to(tl.uint8), inside)
        group = start // GROUP + tl.arange(0, BLOCK_K // GROUP)
        inside = (rows < M)[:, None] & (group < K // GROUP)[None, :]
        tl.store(scale_ptr + rows.to(tl.int64)[:, None] * (K // GROUP) + group[None, :], byte.to(tl.uint8), inside)


def launch(
    x: Tensor, number_format: str, group_size: int, clip_ratio: float = 1.0, prologue: Prologue = NOTHING
) -> Fp4Activations:
    """Quantize activations on the GPU.

    Args:
        x: [M, K] with adjacent columns, where K is a multiple of the group size.
        number_format: `mxfp4` or `nvfp4`.
        group_size: the number of columns that share a scale, a power of two.
        clip_ratio: the grid spans this part of a group's range, in (0, 1].
        prologue: the steps that are done to x first.
    """
    M, K = x.shape
    q = torch.empty((M, K // 2), dtype=torch.uint8, device=x.device)
    scale = torch.empty((M, K // group_size), dtype=torch.uint8, device=x.device)
    global_scale = torch.empty(M, dtype=torch.float32, device=x.device) if number_format == "nvfp4" else None
    block_m, block_k = prologue.tile(M, K, group_size)
    fp4_quantizer_kernel[(triton.cdiv(M, block_m),)](
        x, q, scale, global_scale, *prologue.tensors(), M, K, x.stride(0), prologue.epsilon,
        clip_ratio, group_size, prologue.hadamard, block_m, block_k,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return Fp4Activations(q, scale, global_scale)
