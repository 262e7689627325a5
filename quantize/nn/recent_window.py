"""Attention that reads the last tokens in floating point and those before them as a quantized cache holds them.

A query sees two copies of the recent rows, one rounded and one exact, side by side along the tokens, and its mask
leaves one of each pair. So one attention computes what two score matrices and a choice between them would. What a query
sees does not depend on how a sequence was cut into calls: each has the last `residual_length` tokens, its own among
them, as floats. KIVI (arXiv 2402.02750) calls the length so.
"""

from __future__ import annotations

import torch
from torch import Tensor

Rows = tuple[Tensor, Tensor]


def seen(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Return the mask of attention on [..., n, head_dim] and [..., T, head_dim]: as it is given, or bool [1, 1, n, T].

    Without a mask, causal attention of n queries lets query i see the keys up to i, as torch defines it.
    """
    if mask is not None:
        return mask
    whole = torch.ones(1, 1, query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device)
    return whole.tril() if is_causal else whole


def with_recent_rows(
    query: Tensor, rounded: Rows, recent: Rows, mask: Tensor | None, is_causal: bool, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Put exact rows behind the rounded ones, and hide one of each pair from each query.

    Args:
        query: [..., n, head_dim].
        rounded: keys and values [..., T, head_dim], all of them rounded.
        recent: the last m ≤ T of them in floating point; m is at least `length` and the number of queries, less one, or
            all.
        mask: bool, or added to the scores, [..., n, T]; without one, `is_causal` says what a query sees.
        is_causal: that query i sees the keys up to i.
        length: how many tokens, up to the last one that a query sees, it reads from `recent`.

    Returns:
        The queries, keys and values [..., T + m, head_dim], and the mask [..., n, T + m].
    """
    mask = seen(query, rounded[0], mask, is_causal)
    T, m = rounded[0].shape[-2], recent[0].shape[-2]
    columns = torch.arange(T, device=mask.device)
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    last = columns.where(visible, -1).amax(-1, keepdim=True)
    near = (columns > last - length) & (columns >= T - m)
    hidden = False if mask.dtype == torch.bool else -torch.inf
    behind = mask.masked_fill(~near, hidden)[..., T - m :]
    key, value = (torch.cat(pair, dim=-2) for pair in zip(rounded, recent, strict=True))
    return query, key, value, torch.cat([mask.masked_fill(near, hidden), behind], dim=-1)
