"""Runtime smooth divides channels by their current maximum, which comes back as one scalar for each K tile."""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.kernels.reference import quantized_linear

SMALLEST = 1e-5  # the least scale of a channel


def smooth_scales(x: Tensor, group_size: int, normalize_tokens: bool) -> tuple[Tensor, Tensor]:
    """Return the channels by falling maximum, and the scale that each run of `group_size` of them shares.

    This is Rotated Runtime Smooth (arXiv 2409.20361, section 3.2): s_j = max_t |x_tj|, sorted, and the largest of each
    group. With `normalize_tokens` each token is first divided by its root mean square; the token's own quantizer
    absorbs that factor. Then a token with several spikes, which a rotation turns into a comb, no longer sets the scale
    of all others.

    Args:
        x: [..., K]; the maximum is over all tokens, so a token's result depends on those that run with it.
        group_size: the number of channels that share a scale; the last group may be smaller.
        normalize_tokens: whether tokens are normalized; the paper's rule does not.

    Returns:
        order int64 [K], and s [K] > 0 in that order.
    """
    return sorted_scales(channel_maxima(x, normalize_tokens), group_size)


def channel_maxima(x: Tensor, normalize_tokens: bool) -> Tensor:
    """Return the largest magnitude of each channel of x [..., K] over all tokens, [K]; 1 if there are no tokens."""
    rows = x.reshape(-1, x.shape[-1])
    if normalize_tokens:
        rows = rows / rows.square().mean(-1, keepdim=True).sqrt().clamp(min=SMALLEST)
    return rows.abs().amax(dim=0) if len(rows) else x.new_ones(x.shape[-1])


def sorted_scales(maxima: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return the result of `smooth_scales` from `channel_maxima` [K]."""
    s = maxima.clamp(min=SMALLEST)
    order = s.argsort(descending=True, stable=True)
    shared = s[order][::group_size].repeat_interleave(group_size)[: len(order)]
    return order, shared


def runtime_smooth_linear(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    num_bits: int,
    symmetric: bool,
    clip_ratio: float,
    group_size: int,
    normalize_tokens: bool,
) -> Tensor:
    """Compute `quantized_linear` of x / s, where each group's scale is multiplied onto the group's integer sum.

    Arguments are those of `quantized_linear` and `smooth_scales`; weights have one scale a row, as sorting mixes
    groups.
    """
    order, s = smooth_scales(x.float(), group_size, normalize_tokens)
    filled = -len(order) % group_size
    x_sorted = torch.nn.functional.pad(x[..., order] / s, (0, filled))  # in float32, because s comes back unrounded
    q_sorted = torch.nn.functional.pad(q[:, order], (0, filled))
    scales = scale.float() * s[::group_size]  # not in the scale's own dtype, which would round the product
    zero_points = None if zero_point is None else zero_point.expand(scales.shape)
    return quantized_linear(x_sorted, q_sorted, scales, zero_points, bias, num_bits, symmetric, clip_ratio).to(x)
