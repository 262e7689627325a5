"""FP4 has E2M1 values in groups that share a scale; the integers here are twice the E2M1 values.

So x ≈ q · scale with q in ±{0, 1, 2, 3, 4, 6, 8, 12} and with half the format's own scale, and the product of two FP4
matrices is a product of integers. The formats differ only in their scales:
    mxfp4: E8M0, a power of two (OCP Microscaling Formats specification 1.0)
    nvfp4: E4M3 times a float32 for each tensor or token, the global scale (as in Egiazarian et al. 2025,
        arXiv 2509.23202)
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.kernels.packing import pack_int4, unpack_int4

MAGNITUDES = (0, 1, 2, 3, 4, 6, 8, 12)  # twice 0, 0.5, 1, 1.5, 2, 3, 4, 6, by code
SIGN = 8  # the sign bit of a code
LARGEST = 6.0  # of E2M1
E4M3_SMALLEST, E4M3_LARGEST = 2.0**-9, 448.0
E8M0_BIAS = 127
EXPONENT = 0x7F800000  # the bits of a float32 that hold its exponent


def round_to_e2m1(x: Tensor) -> Tensor:
    """Return the nearest of ±`MAGNITUDES`, ties to the even mantissa, saturating at ±12, in the dtype of `x`."""
    power = (x.float().view(torch.int32) & EXPONENT).view(torch.float32)  # the largest power of two in x
    step = power.mul_(0.5).clamp_(1, 4).to(x.dtype)
    return (x / step).round_().mul_(step).clamp_(-MAGNITUDES[-1], MAGNITUDES[-1])


def pack_fp4(q: Tensor) -> Tensor:
    """Pack int8 [..., K] of values ±`MAGNITUDES` as codes, sign | magnitude, in uint8 [..., ⌈K/2⌉], even index low."""
    codes = torch.bucketize(q.abs().contiguous(), torch.tensor(MAGNITUDES, dtype=q.dtype, device=q.device))
    return pack_int4((codes + SIGN * (q < 0)).to(torch.int8))


def unpack_fp4(packed: Tensor, columns: int) -> Tensor:
    """Undo `pack_fp4`: uint8 [..., ⌈K/2⌉] → int8 [..., K] with K = `columns`; the code of -0 gives 0."""
    values = torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)], dtype=torch.int8, device=packed.device)
    return values[(unpack_int4(packed, columns) & 0xF).int()]


def nvfp4_global_scale(largest: Tensor) -> Tensor:
    """Return the float32 scale at which a tensor's or token's largest magnitude reaches the top of E4M3 and E2M1."""
    return (largest.float() / (LARGEST * E4M3_LARGEST)).clamp(min=torch.finfo(torch.float32).tiny)


def fp4_scale(largest: Tensor, global_scale: Tensor | None) -> Tensor:
    """Return the scale > 0, float32, of the integers of groups with these largest magnitudes.

    MXFP4 takes 2^(⌊log2 largest⌋ - 2) as in the OCP specification, which saturates magnitudes above 6 times this power.
    NVFP4 takes largest / 6, rounded to E4M3.

    Args:
        largest: float32 ≥ 0, any shape.
        global_scale: the result of `nvfp4_global_scale` for NVFP4, broadcast against `largest`; None for MXFP4.
    """
    if global_scale is None:
        exponent = (torch.frexp(largest).exponent - 3).clamp(
            1 - E8M0_BIAS, E8M0_BIAS
        )  # frexp's mantissas are in [½, 1)
        return decode_scale((exponent + E8M0_BIAS).to(torch.uint8), None)
    scale = (largest / LARGEST / global_scale).clamp(E4M3_SMALLEST, E4M3_LARGEST)
    return decode_scale(scale.to(torch.float8_e4m3fn), global_scale)


def encode_scale(scale: Tensor, global_scale: Tensor | None) -> Tensor:
    """Return a scale of `fp4_scale` in one byte without loss: uint8 exponents for MXFP4, float8_e4m3fn for NVFP4."""
    if global_scale is None:
        return (torch.frexp(scale).exponent + E8M0_BIAS).to(torch.uint8)  # scale = ½ · 2^exponent
    return (2 * scale / global_scale).to(torch.float8_e4m3fn)


def decode_scale(stored: Tensor, global_scale: Tensor | None) -> Tensor:
    """Undo `encode_scale`: return float32."""
    if global_scale is None:
        return (stored.int() << 23).view(torch.float32) / 2  # a float32 has the same exponent with the same bias
    return stored.float() * global_scale / 2


def quantize_fp4(x: Tensor, number_format: str, group_size: int, clip_ratio: float = 1.0) -> tuple[Tensor, Tensor]:
    """Quantize activations dynamically in groups along the last axis; NVFP4 has a global scale for each token.

    Args:
        x: float32 [..., K], K a multiple of the group size.
        number_format: `mxfp4` or `nvfp4`.
        group_size: the number of channels that share a scale.
        clip_ratio: the grid spans this part of a group's range, in (0, 1].

    Returns:
        q int8 [..., K] of values ±`MAGNITUDES`, and scale float32 [..., K / group_size].
    """
    values, scale = round_groups(x, number_format, group_size, clip_ratio)
    return values.flatten(-2).to(torch.int8), scale


def round_groups(x: Tensor, number_format: str, group_size: int, clip_ratio: float) -> tuple[Tensor, Tensor]:
    """Return the result of `quantize_fp4` in float32, its values [..., K / group_size, group_size]."""
    groups = x.unflatten(-1, (-1, group_size))
    largest = groups.abs().amax(dim=-1) * clip_ratio
    global_scale = nvfp4_global_scale(largest.amax(dim=-1, keepdim=True)) if number_format == "nvfp4" else None
    scale = fp4_scale(largest, global_scale)
    return round_to_e2m1(groups / scale[..., None]), scale
