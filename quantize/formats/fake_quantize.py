"""Fake quantization does in floating point to activations and weights what integers will do to them."""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.formats.base import get_format
from quantize.kernels.ops import fake_quantize_dynamically, quantize_per_token, smooth_scales
from quantize.scheme.scheme import ActivationArgs, KVCacheArgs


def fake_quantize(x: Tensor, args: ActivationArgs | None) -> Tensor:
    """Return activations [..., K] as the quantized linear sees them, unchanged if they are not quantized."""
    if args is None:
        return x
    if args.runtime_smooth is None:
        return fake_quantize_dynamically(x, *quantizer_arguments(args)).to(x)
    s = smooth_scale(x, args)
    return fake_quantize_dynamically(x / s, *quantizer_arguments(args)).to(x) * s


def smoothed(x: Tensor, args: ActivationArgs | None) -> Tensor:
    """Return activations [..., K] as they are before they are rounded."""
    return x if args is None else x / smooth_scale(x, args)


def smooth_scale(x: Tensor, args: ActivationArgs) -> Tensor:
    """Return the scale [K] by which runtime smooth divides each channel, or ones without runtime smooth."""
    smooth = args.runtime_smooth
    if smooth is None:
        return torch.ones_like(x[..., :1])
    order, s = smooth_scales(x.float(), smooth.group_size, smooth.normalize_tokens)
    return s[order.argsort()].to(x)


def quantizer_arguments(args: ActivationArgs) -> tuple[int, bool, float, str, int]:
    """Return the kernels' arguments: bits, symmetric, clip ratio, format, group size."""
    group_size = get_format(args.format).group_size or 0
    return args.num_bits, args.symmetric, args.clip_ratio, args.format, group_size


def on_grid(x: Tensor, num_bits: int, args: KVCacheArgs) -> Tensor:
    """Round keys or values [..., head_dim] to a grid of `num_bits` for each head of each token."""
    q, scale, zero_point = quantize_per_token(x, num_bits, args.symmetric, args.clip_ratio)
    return (q.to(x) - zero_point.to(x)) * scale
