"""OSCAR's rotations of keys and values (arXiv 2605.17757), fitted for each layer and head that holds keys.

R = U H P: the eigenvectors U of a second moment, a Hadamard matrix, and a bit reversal of channels. For keys it is that
of the queries that read the head, Σ qᵀq behind the rotary embedding. For values it is Σ w_t v_tᵀv_t with w_t = k_t
(Σ qᵀq) k_tᵀ, as the authors' repository defines it; a guide of ONNX Runtime (pull request 31726) has Σ (S V)ᵀ(S V) in
its place. P moves channels between groups and does nothing where a head is one group, as here. Grids span 0.96 of a
key's and 0.92 of a value's range, which are the ratios that the repository serves with.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks.claims.kv_cache import Change, Heads, recorded, rounded, turned

CLIPPED = (0.96, 0.92)  # parts of the ranges of keys and of values


@functools.cache
def rotations(each_head: bool = True) -> tuple[tuple[Tensor, Tensor], ...]:
    """Return R for keys and values of each layer, [heads, head_dim, head_dim], or one for all heads of a layer."""
    found = []
    for rows in recorded():
        heads = len(rows.key)
        query = rows.query.unflatten(0, (heads, -1)).flatten(1, 2)
        target = query.mT @ query
        weight = ((rows.key @ target) * rows.key).sum(-1, keepdim=True)
        moments = target, rows.value.mT @ (weight * rows.value)
        shared = moments if each_head else tuple(x.sum(0, keepdim=True).expand_as(x) for x in moments)
        found.append(tuple(turned(torch.linalg.eigh(x.double()).eigenvectors.flip(-1).float()) for x in shared))
    return tuple((key, value) for key, value in found)


def oscar(bits: int, each_head: bool = True) -> Change:
    """Return rounding of each head of each token behind these rotations."""
    fitted = rotations(each_head)

    def change(layer: int, query: Tensor, *rows: Tensor) -> Heads:
        pairs = zip(rows, fitted[layer], CLIPPED, strict=True)
        key, value = (rounded(x @ R, bits, clip) @ R.mT for x, R, clip in pairs)
        return query, key, value

    return change
