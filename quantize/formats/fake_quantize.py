"""Quantize and dequantize: what integers will do to activations and weights, in floating point."""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.formats.base import get_format
from quantize.kernels.ops import dequantize, quantize_dynamically, quantize_per_token, smooth_scales
from quantize.scheme.scheme import ActivationArgs, KVCacheArgs


def fake_quantize(x: Tensor, args: ActivationArgs | None) -> Tensor:
    """Activations [..., K] as the quantized linear sees them; unchanged where they are not quantized."""
    if args is None:
        return x
    s = smooth_scale(x, args)
    return dequantize(*quantize_dynamically(x / s, *quantizer_arguments(args))).to(x) * s


def smoothed(x: Tensor, args: ActivationArgs | None) -> Tensor:
    """Activations [..., K] as they meet their grid."""
    return x if args is None else x / smooth_scale(x, args)


def smooth_scale(x: Tensor, args: ActivationArgs) -> Tensor:
    """What runtime smooth divides each channel by, [K]; ones without it."""
    smooth = args.runtime_smooth
    if smooth is None:
        return torch.ones_like(x[..., :1])
    order, s = smooth_scales(x.float(), smooth.group_size, smooth.normalize_tokens)
    return s[order.argsort()].to(x)


def quantizer_arguments(args: ActivationArgs) -> tuple[int, bool, float, str, int]:
    """What the kernels take: bits, symmetric, clip ratio, format, group size."""
    group_size = get_format(args.format).group_size or 0
    return args.num_bits, args.symmetric, args.clip_ratio, args.format, group_size


def on_grid(x: Tensor, args: KVCacheArgs) -> Tensor:
    """Keys or values [..., head_dim] rounded to a grid for each head of each token."""
    q, scale, zero_point = quantize_per_token(x, args.num_bits, args.symmetric, args.clip_ratio)
    return (q.to(x) - zero_point.to(x)) * scale
