"""Stored weights become what the kernels read, and back; `exact_gemm` is the exact product of such operands."""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.kernels.config import LARGEST_K, TOKEN_TILES
from quantize.kernels.packed import (
    BLOCK,
    HALF,
    PackedWeight,
    QuantizedActivations,
    halves,
    pack_nibbles,
    pad_columns,
    unpack_nibbles,
    unpack_pairs,
)
from quantize.kernels.reference import centred, grouped_product

SMALLEST_TILE = 16  # channels


def supported(columns: int, group_size: int, num_bits: int) -> bool:
    """Return whether the kernels know weights of so many columns in groups of this size; 0 means all columns."""
    in_blocks = group_size in (BLOCK // 4, HALF) or group_size % BLOCK == 0
    return in_blocks and (num_bits == 4 or group_size > 0 or columns <= LARGEST_K)


def prepack(q: Tensor, scale: Tensor, zero_point: Tensor | None, num_bits: int) -> PackedWeight:
    """Lay out a weight once, when it reaches its device.

    Args:
        q: int8 [N, K].
        scale: [N, G]; the columns fall into G equal groups, G = 1 is per-channel.
        zero_point: int8 [N, G], or None for symmetric weights.
        num_bits: 4, or up to 8, which lie in whole bytes.
    """
    N, K = q.shape
    channel, group_scale = two_levels(scale.float())
    sums = centred(q, zero_point).unflatten(-1, (scale.shape[1], -1)).sum(-1, dtype=torch.int32)
    return PackedWeight(
        data=pack_nibbles(q) if num_bits == 4 else pad_columns(q),
        scale=channel,
        group_scale=group_scale,
        zero_point=None if zero_point is None else zero_point.int().T.contiguous(),
        weight_sum=sums.T.contiguous(),
        high_sum=halves(pad_columns(q))[1].sum((-2, -1), dtype=torch.int32),
        counters=torch.zeros(TOKEN_TILES * -(-N // SMALLEST_TILE), dtype=torch.int32, device=q.device),
        columns=K,
        layout="w4" if num_bits == 4 else "w8",
    )


def unpack_weight(pw: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """Undo `prepack`: return q int8 [N, K], scale float32 [N, G], and zero point int8 [N, G] or None."""
    q = unpack_nibbles(pw.data, pw.columns) if pw.layout == "w4" else pw.data[:, : pw.columns]
    scale = pw.scale[:, None] if pw.group_scale is None else pw.group_scale.T.float() * pw.scale[:, None]
    return q, scale, None if pw.zero_point is None else pw.zero_point.T.to(torch.int8)


def two_levels(scale: Tensor) -> tuple[Tensor, Tensor | None]:
    """Split scales of groups into an 8-bit integer times a scale of the channel, if that gives each scale exactly.

    Every float32 is an integer times a power of two, so the channel's scale is the greatest common divisor.

    Args:
        scale: float32 [N, G], not 0.

    Returns:
        The channel's scale [N], and the groups' [G, N]: uint8; float32 of all channels if one has none of 8 bits, whose
        scale is then 1; None for G = 1.
    """
    if scale.shape[1] == 1:
        return scale[:, 0].contiguous(), None
    mantissa, exponent = torch.frexp(scale)
    lowest = exponent.amin(1, keepdim=True)
    integers = torch.ldexp(mantissa.double(), exponent - lowest + 24)  # exact: whole numbers below 2^(24 + 8) if near
    near = bool((exponent - lowest <= 8).all())
    divisor = common_divisor(integers.long()) if near else torch.ones_like(lowest[:, 0])
    ratio = integers / divisor[:, None]
    if not near or bool(((ratio > 255) | (ratio < 0)).any()):
        return torch.ones_like(scale[:, 0]), scale.T.contiguous()
    return torch.ldexp(divisor.double(), lowest[:, 0] - 24).float(), ratio.T.to(torch.uint8).contiguous()


def common_divisor(integers: Tensor) -> Tensor:
    """Return the greatest common divisor of each row, int64 [N, G] → [N]."""
    divisor = integers[:, 0]
    for column in integers[:, 1:].unbind(1):
        divisor = torch.gcd(divisor, column)
    return divisor


def unpack_activations(qa: QuantizedActivations) -> Tensor:
    """int8 [M, K'], in natural order."""
    return unpack_pairs(qa.q) if qa.layout == "pair" else qa.q


def exact_gemm(qa: QuantizedActivations, pw: PackedWeight, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """Compute `quantized_linear` from operands as the kernels read them; every GEMM kernel must give the same.

    The arguments are those of `gemm.launch`.
    """
    ends = torch.tensor([len(qa.q)], dtype=torch.int32)
    return exact_expert_gemm(qa, pw, ends, bias, out_dtype)


def exact_expert_gemm(
    qa: QuantizedActivations, pw: PackedWeight, ends: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Compute `experts.launch`, expert by expert."""
    q, scale, zero_point = unpack_weight(pw)
    w = centred(q, zero_point)
    a = unpack_activations(qa)[:, : pw.columns].to(torch.int16) - qa.zero_point[:, None].to(torch.int16)
    N, start, parts = len(w) // len(ends), 0, []
    for expert, end in enumerate(ends.tolist()):
        rows, channels = slice(start, end), slice(expert * N, (expert + 1) * N)
        y = grouped_product(a[rows], w[channels], scale[channels]) * qa.scale[rows, None]
        parts.append((y if bias is None else y + bias[channels].to(y)).to(out_dtype))
        start = end
    return torch.cat(parts)
