"""KVarN (arXiv 2606.03458): a tile of 128 tokens of a head with rows and columns of even deviation, behind a Hadamard.

The logarithms of the scales of tokens and of channels take turns, 16 rounds, and the round of least imbalance counts,
as in the reference of the authors' repository. Keys are then rounded for each channel over the tile, values for each
token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.claims.kv_cache import Change, Heads, rounded, turned

TILE, ROUNDS = 128, 16
LEAST, MOST = -0.3, 10.0  # of a scale's logarithm


def balancing(x: Tensor) -> Tensor:
    """Return what tiles [..., tokens, channels] are divided by: the scales of tokens times those of channels."""
    logs = {dim: torch.zeros_like(x.sum(dim, keepdim=True)) for dim in (-1, -2)}
    best, least = torch.ones_like(x), imbalance(x)
    for _ in range(ROUNDS):
        for dim in logs:
            spread = (x / (logs[-1] + logs[-2]).exp()).std(dim, keepdim=True).clamp(1e-3, 1e3)
            logs[dim] = (logs[dim] + spread.log()).clamp(LEAST, MOST)
        scale = (logs[-1] + logs[-2]).exp()
        found = imbalance(x / scale)
        best, least = torch.where(found <= least, scale, best), torch.minimum(found, least)
    return best


def imbalance(x: Tensor) -> Tensor:
    """Return the largest by the least deviation of tokens plus that of channels, [..., 1, 1]."""
    tokens, channels = (s.amax(-1) / s.amin(-1).clamp(min=1e-8) for s in (x.std(-1), x.std(-2)))
    return (tokens + channels)[..., None, None]


def kvarn(bits: tuple[int, int], balanced: bool = True) -> Change:
    """Return KVarN's rounding with bits of keys and values, or the same without its scales."""

    def change(_: int, query: Tensor, *rows: Tensor) -> Heads:
        tiles = [turned(x).unflatten(-2, (-1, TILE)) for x in rows]
        scales = [balancing(x) if balanced else torch.ones_like(x) for x in tiles]
        how = zip(tiles, scales, bits, (-2, -1), strict=True)
        key, value = (turned((rounded(x / s, b, dim=dim) * s).flatten(-3, -2)) for x, s, b, dim in how)
        return query, key, value

    return change
