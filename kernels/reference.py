"""The truth that every kernel is compared with: plain torch, integers accumulated exactly."""

from __future__ import annotations

import torch
from torch import Tensor


def integer_range(num_bits: int) -> tuple[int, int]:
    """Smallest and largest signed integer of `num_bits`."""
    return -(1 << (num_bits - 1)), (1 << (num_bits - 1)) - 1


def scale_and_zero_point(low: Tensor, high: Tensor, num_bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point whose grid spans [low, high] and zero; x ≈ (q - zero_point) · scale.

    Symmetric grids reach ±(2^(b-1) - 1), so the zero point is 0; a range of zero width gets the scale 1.
    """
    qmin, qmax = integer_range(num_bits)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = torch.maximum(-low, high) / qmax if symmetric else (high - low) / (qmax - qmin)
    scale = torch.where(scale > torch.finfo(scale.dtype).tiny, scale, torch.ones_like(scale))
    zero_point = torch.zeros_like(scale) if symmetric else (qmin - low / scale).round().clamp(qmin, qmax)
    return scale, zero_point


def round_to_grid(x: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int) -> Tensor:
    """The nearest integers of the grid, half to even, saturating; in the dtype of `x`."""
    return (x / scale + zero_point).round().clamp(*integer_range(num_bits))


def quantize_per_token(
    x: Tensor, num_bits: int, symmetric: bool, clip_ratio: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Dynamic activation quantization: one scale and zero point for each row of the last axis.

    Args:
        x: activations [..., K].
        num_bits: 2 to 8.
        symmetric: zero point fixed at 0.
        clip_ratio: the grid spans this part of the row's range, in (0, 1].

    Returns:
        q [..., K] int8, scale [..., 1] in the dtype of x, zero_point [..., 1] int8.
    """
    low, high = x.aminmax(dim=-1, keepdim=True)
    scale, zero_point = scale_and_zero_point(low * clip_ratio, high * clip_ratio, num_bits, symmetric)
    return round_to_grid(x, scale, zero_point, num_bits).to(torch.int8), scale, zero_point.to(torch.int8)


def integer_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b.T` of integers [..., K] and [N, K] held as int8 or int16, summed exactly; the result is float.

    BLAS has no integer product, so it runs in the narrowest float whose mantissa holds every partial sum.
    """
    largest = a.shape[-1] * int(a.abs().max()) * int(b.abs().max()) if a.numel() and b.numel() else 0
    dtype = torch.float32 if largest < 2**24 else torch.float64
    return a.to(dtype) @ b.to(dtype).T


def quantized_linear(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    num_bits: int,
    symmetric: bool,
    clip_ratio: float,
) -> Tensor:
    """`x @ Wᵀ + bias` with x quantized per token and W given as integers, accumulated in integers group by group.

    Args:
        x: activations [..., K].
        q: weights int8 [N, K].
        scale: [N, G]; the K columns fall into G equal groups, G = 1 is per-channel.
        zero_point: int8 [N, G], or None for symmetric weights.
        bias: [N] or None.
        num_bits: bits of the activations.
        symmetric: whether the activations' zero point is fixed at 0.
        clip_ratio: part of a token's range that its grid spans.
    """
    q_x, scale_x, zero_x = quantize_per_token(x.float(), num_bits, symmetric, clip_ratio)
    centred_x = q_x.to(torch.int16) - zero_x
    centred_w = centred(q, zero_point)
    group = q.shape[1] // scale.shape[1]
    y = sum(
        integer_matmul(centred_x[..., k : k + group], centred_w[:, k : k + group]).to(x.dtype)
        * scale[:, k // group].to(x)
        for k in range(0, q.shape[1], group)
    )
    y = y * scale_x.to(x)
    return y if bias is None else y + bias.to(x)


def centred(q: Tensor, zero_point: Tensor | None) -> Tensor:
    """int16 [N, K]: the weights' integers less the zero point of their group."""
    wide = q.to(torch.int16)
    return wide if zero_point is None else wide - zero_point.repeat_interleave(q.shape[1] // zero_point.shape[1], dim=1)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """float32 [N, K]: (q - zero_point) · scale, group by group."""
    return centred(q, zero_point).float() * scale.float().repeat_interleave(q.shape[1] // scale.shape[1], dim=1)
