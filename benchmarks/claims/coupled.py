"""Coupled quantization of a KV cache (CQ, arXiv 2405.03917): neighbouring channels of a head share one code.

Each group of c channels of each head has 2^b centroids, b / c bits a channel, of keys in front of the rotary embedding
and of values. Centroids come of k-means on the bundled prose, where a token weighs gᵀg with the gradient g of the loss
with respect to the group (a diagonal of Fisher's matrix), or one. It starts at tokens drawn by weight.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks.claims.kv_cache import Change, Heads, positions_undone, recorded

ROUNDS = 5


def coded(x: Tensor, centroids: Tensor) -> Tensor:
    """Return the code of each row of x [groups, n, c] among its group's centroids [groups, count, c]: [groups, n]."""
    return (x @ centroids.mT - centroids.square().sum(-1)[:, None] / 2).argmax(-1)


def weighted_kmeans(x: Tensor, weight: Tensor, count: int, rounds: int = ROUNDS) -> Tensor:
    """Return the centroids [groups, count, c] of rows [groups, n, c] with weights [groups, n], by Lloyd's algorithm."""
    drawn = torch.multinomial(weight, count, generator=torch.Generator().manual_seed(0))
    centroids = x.gather(1, drawn[..., None].expand(-1, -1, x.shape[-1]))
    for _ in range(rounds):
        codes = coded(x, centroids)
        sizes = torch.zeros(centroids.shape[:2]).scatter_add_(1, codes, weight)[..., None]
        to = codes[..., None].expand_as(x)
        sums = torch.zeros_like(centroids).scatter_add_(1, to, x * weight[..., None])
        centroids = torch.where(sizes > 0, sums / sizes.clamp(min=1e-30), centroids)
    return centroids


def in_groups(x: Tensor, coupled: int) -> Tensor:
    """Return [heads, n, head_dim] as [heads · head_dim / coupled, n, coupled]."""
    groups: Tensor = x.unflatten(-1, (-1, coupled)).transpose(-2, -3)
    return groups.flatten(0, 1)


@functools.cache
def codebooks(coupled: int, bits: int, fisher: bool) -> tuple[tuple[Tensor, Tensor], ...]:
    """Return the centroids of keys and values of each layer."""
    found = []
    for rows in recorded():
        fitted = (positions_undone(rows.key), positions_undone(rows.key_gradient)), (rows.value, rows.value_gradient)
        books = []
        for x, gradient in fitted:
            g = in_groups(gradient, coupled).square().sum(-1)
            weight = (g / g.mean(-1, keepdim=True)).clamp(min=1e-6) if fisher else torch.ones_like(g)
            books.append(weighted_kmeans(in_groups(x, coupled), weight, 2**bits))
        found.append((books[0], books[1]))
    return tuple(found)


def replaced(x: Tensor, centroids: Tensor) -> Tensor:
    """Return x [batch, heads, tokens, head_dim] with each group as its nearest centroid."""
    rows = in_groups(x.transpose(0, 1).flatten(1, 2), centroids.shape[-1])
    codes = coded(rows, centroids)[..., None].expand_as(rows)
    heads = centroids.gather(1, codes).unflatten(0, (x.shape[1], -1)).transpose(-2, -3).flatten(-2)
    found: Tensor = heads.unflatten(1, (x.shape[0], -1)).transpose(0, 1)
    return found


def coupled(channels: int, bits: int, fisher: bool = True) -> Change:
    """Return CQ with so many channels and bits to a code."""
    fitted = codebooks(channels, bits, fisher)

    def change(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Heads:
        keys, values = fitted[layer]
        return query, positions_undone(replaced(positions_undone(key), keys), sign=1), replaced(value, values)

    return change
