"""Quantize and dequantize: what integers will do to activations and weights, in floating point."""

from __future__ import annotations

from torch import Tensor

from quantize.kernels.ops import quantize_per_token, smooth_scales
from quantize.scheme import ActivationArgs, KVCacheArgs


def fake_quantize(x: Tensor, args: ActivationArgs | None) -> Tensor:
    """Activations [..., K] as the quantized linear sees them; unchanged where they are not quantized."""
    if args is None:
        return x
    if args.runtime_smooth is None:
        return on_grid(x, args)
    smooth = args.runtime_smooth
    order, s = smooth_scales(x.float(), smooth.group_size, smooth.normalize_tokens)
    s = s[order.argsort()].to(x)
    return on_grid(x / s, args) * s


def on_grid(x: Tensor, args: ActivationArgs | KVCacheArgs) -> Tensor:
    """X [..., K] rounded to a grid for each row."""
    q, scale, zero_point = quantize_per_token(x, args.num_bits, args.symmetric, args.clip_ratio)
    return (q.to(x) - zero_point.to(x)) * scale
