"""The reference, with which every kernel is compared, is plain torch and sums integers exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.kernels.fp4 import quantize_fp4, round_groups

LARGEST_DIFFERENCE = 255  # of two int8, such as an integer and its zero point


def integer_range(num_bits: int) -> tuple[int, int]:
    """Return the smallest and the largest signed integer of `num_bits`."""
    return -(1 << (num_bits - 1)), (1 << (num_bits - 1)) - 1


def scale_and_zero_point(low: Tensor, high: Tensor, num_bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return the scale and the zero point whose grid spans [low, high] and zero; x ≈ (q - zero_point) · scale.

    Symmetric grids reach ±(2^(b-1) - 1), so the zero point is 0; a range of zero width gets the scale 1.
    """
    qmin, qmax = integer_range(num_bits)
    if not symmetric:
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale = torch.maximum(-low, high) / qmax if symmetric else (high - low) / (qmax - qmin)
    scale = torch.where(scale > torch.finfo(scale.dtype).tiny, scale, 1.0)
    zero_point = torch.zeros_like(scale) if symmetric else (qmin - low / scale).round().clamp(qmin, qmax)
    return scale, zero_point


def round_to_grid(x: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int) -> Tensor:
    """Return the nearest integers of the grid, half to even and saturating, in the dtype of `x`."""
    return (x / scale + zero_point).round().clamp(*integer_range(num_bits))


def token_qparams(x: Tensor, num_bits: int, symmetric: bool, clip_ratio: float) -> tuple[Tensor, Tensor]:
    """Return the scale and the zero point [..., 1] of each row of activations [..., K], in the dtype of x."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)  # on a CPU 16 times as fast as `aminmax`
    if clip_ratio != 1:
        low, high = low * clip_ratio, high * clip_ratio
    return scale_and_zero_point(low, high, num_bits, symmetric)


def quantize_per_token(
    x: Tensor, num_bits: int, symmetric: bool, clip_ratio: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize activations dynamically, with one scale and zero point for each row of the last axis.

    Args:
        x: activations [..., K].
        num_bits: 2 to 8.
        symmetric: whether the zero point is fixed at 0.
        clip_ratio: the grid spans this part of the row's range, in (0, 1].

    Returns:
        q [..., K] int8, scale [..., 1] in the dtype of x, zero_point [..., 1] int8.
    """
    scale, zero_point = token_qparams(x, num_bits, symmetric, clip_ratio)
    return round_to_grid(x, scale, zero_point, num_bits).to(torch.int8), scale, zero_point.to(torch.int8)


def quantize_dynamically(
    x: Tensor, num_bits: int, symmetric: bool, clip_ratio: float, number_format: str, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize activations in any format, by `quantize_per_token`, or by `quantize_fp4` with zero points of 0.

    Returns:
        q [..., K] int8, scale [..., G] in the dtype of x, zero_point [..., 1] int8; G = 1 for integers.
    """
    if number_format == "int":
        return quantize_per_token(x, num_bits, symmetric, clip_ratio)
    q, scale = quantize_fp4(x.float(), number_format, group_size, clip_ratio)
    return q, scale.to(x), torch.zeros_like(q[..., :1])


def fake_integers(x: Tensor, num_bits: int, symmetric: bool, clip_ratio: float) -> tuple[Tensor, Tensor]:
    """Quantize activations [..., K] by `quantize_per_token`, but keep the integers in floating point.

    All steps but the first work in place.

    Returns:
        q - zero_point, float32 [..., K], and scale float32 [..., 1], both equal to those of `quantize_per_token`.
    """
    x = x.float()
    scale, zero_point = token_qparams(x, num_bits, symmetric, clip_ratio)
    if symmetric:
        return (x / scale).round_().clamp_(*integer_range(num_bits)), scale
    return (x / scale).add_(zero_point).round_().clamp_(*integer_range(num_bits)).sub_(zero_point), scale


def fake_quantize_dynamically(
    x: Tensor, num_bits: int, symmetric: bool, clip_ratio: float, number_format: str, group_size: int
) -> Tensor:
    """Return `dequantize(*quantize_dynamically(x.float(), ...))`, float32 [..., K], without integers in between."""
    if number_format == "int":
        q, scale = fake_integers(x, num_bits, symmetric, clip_ratio)
        return q.mul_(scale)
    values, scale = round_groups(x.float(), number_format, group_size, clip_ratio)
    return values.mul_(scale[..., None]).flatten(-2)


def integer_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b.T` of integers [..., K] and [N, K] held as int8 or int16, summed exactly, in floating point.

    BLAS has no integer product, so it runs in the narrowest float whose mantissa holds every partial sum. A compiler
    knows no values, so that it takes what differences of two int8 reach.
    """
    if torch.compiler.is_compiling():
        largest = a.shape[-1] * LARGEST_DIFFERENCE**2
    else:
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
    number_format: str = "int",
    group_size: int = 0,
) -> Tensor:
    """Compute `x @ Wᵀ + bias` with quantized x and integer W, accumulated in integers group by group.

    The sum over groups is in float32 at least, whatever the dtype of x.

    Args:
        x: activations [..., K].
        q: weights int8 [N, K].
        scale: [N, G]; the K columns form G equal groups, and G = 1 is per-channel.
        zero_point: int8 [N, G], or None for symmetric weights.
        bias: [N] or None.
        num_bits: the bits of the activations.
        symmetric: whether the activations' zero point is fixed at 0.
        clip_ratio: the part of a token's or group's range that its grid spans.
        number_format: the format of the activations: `int`, `mxfp4` or `nvfp4`.
        group_size: the number of channels that share a scale of x, a multiple of the weights' group; 0 means all.
    """
    q_x, scale_x, zero_x = quantize_dynamically(x.float(), num_bits, symmetric, clip_ratio, number_format, group_size)
    centred_x, centred_w = q_x.to(torch.int16) - zero_x, centred(q, zero_point)
    scale = scale.to(torch.promote_types(x.dtype, torch.float32))
    span, group = q.shape[1] // scale_x.shape[-1], q.shape[1] // scale.shape[1]
    y = scale.new_zeros(())
    for k in range(0, q.shape[1], span):
        of_w = scale[:, k // group : (k + span) // group]
        part = grouped_product(centred_x[..., k : k + span], centred_w[:, k : k + span], of_w)
        y = y + part * scale_x[..., k // span, None].to(scale)
    return (y if bias is None else y + bias.to(y)).to(x.dtype)


def grouped_product(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    """Multiply integers [..., K] and [N, K] with scale [N, G]: each group is summed exactly, then scaled → [..., N]."""
    group = w.shape[1] // scale.shape[1]
    products = (
        integer_matmul(x[..., k : k + group], w[:, k : k + group]).to(scale) * scale[:, k // group]
        for k in range(0, w.shape[1], group)
    )
    return sum(products, scale.new_zeros(()))


def centred(q: Tensor, zero_point: Tensor | None) -> Tensor:
    """Return integers minus the zero point [..., G] of their group, int16 [..., K]."""
    wide = q.to(torch.int16)
    return wide if zero_point is None else wide - per_column(zero_point, q.shape[-1])


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Return (q - zero_point) · scale, float32 [..., K], group by group, from scale and zero point [..., G]."""
    groups: Tensor = q.float().unflatten(-1, (scale.shape[-1], -1))
    if zero_point is not None:
        groups -= zero_point[..., None]
    return (groups * scale.float()[..., None]).flatten(-2)


def per_column(values: Tensor, columns: int) -> Tensor:
    """Repeat each group's value for each of its columns: [..., G] → [..., K] with K = `columns`."""
    return values.repeat_interleave(columns // values.shape[-1], dim=-1)
