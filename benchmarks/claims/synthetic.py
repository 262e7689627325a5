"""Some claims are not about a codebook's levels; these are the small synthetic experiments that measure them."""

from __future__ import annotations

import torch
from torch import Tensor


def channels(tokens: int, correlated: bool, rng: torch.Generator) -> Tensor:
    """Draw activations [tokens, 64] of unit variance, independent or with two common causes for each 8 channels."""
    own, common = torch.randn(tokens, 64, generator=rng), torch.randn(tokens, 8, 2, generator=rng)
    mix = torch.randn(8, 2, 8, generator=torch.Generator().manual_seed(1))
    shared = torch.einsum("tgc,gck->tgk", common, mix / mix.norm(dim=1, keepdim=True)).reshape(tokens, 64)
    return 0.95 * shared + (1 - 0.95**2) ** 0.5 * own if correlated else own


def kmeans_error(coupled: int, bits: int, correlated: bool) -> float:
    """Return CQ's relative error on unseen tokens if `coupled` channels share one code (arXiv 2405.03917)."""
    rng, error = torch.Generator().manual_seed(0), 0.0
    seen, unseen = channels(4096, correlated, rng), channels(1024, correlated, rng)
    for known, new in zip(seen.split(coupled, dim=1), unseen.split(coupled, dim=1), strict=True):
        centroids = kmeans(known, 2**bits, rng)
        error += float((centroids[torch.cdist(new, centroids).argmin(dim=1)] - new).square().sum())
    return error / float(unseen.square().sum())


def kmeans(x: Tensor, count: int, rng: torch.Generator, rounds: int = 15) -> Tensor:
    """Return the centroids [count, c] of the rows of x [n, c], by Lloyd's algorithm."""
    centroids = x[torch.randperm(len(x), generator=rng)[:count]]
    for _ in range(rounds):
        nearest = torch.nn.functional.one_hot(torch.cdist(x, centroids).argmin(dim=1), count).to(x)
        sizes = nearest.sum(dim=0)[:, None]
        centroids = torch.where(sizes > 0, nearest.T @ x / sizes.clamp(min=1), centroids)
    return centroids


def sparse_error(share: float, sparsity: float = 0.5, size: int = 256) -> float:
    """Return R-Sparse's relative output error with kept channels and a low rank for the others (ICLR 2025).

    Args:
        share: the part of the budget that channels take; the low rank takes the rest.
        sparsity: the part of the weights that the budget leaves out.
        size: rows and columns; the spectrum falls as a power law, and inputs are normal.
    """
    rng = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(size, size, generator=rng)).Q for _ in range(2))
    S = torch.arange(1, size + 1.0) ** -0.7
    x = torch.randn(128, size, generator=rng)
    W = U * S @ V.T
    score = x.abs() * W.norm(dim=0)
    kept = int(size * (1 - sparsity) * share)
    mask = score >= score.topk(kept, dim=1).values[:, -1:] if kept else torch.zeros_like(score, dtype=torch.bool)
    rank = int((1 - sparsity) * (1 - share) * size / 2)  # N K / (N + K)
    low_rank = U[:, :rank] * S[:rank] @ V[:, :rank].T
    y = (x * mask) @ W.T + (x * ~mask) @ low_rank.T
    return float((y - x @ W.T).square().sum() / (x @ W.T).square().sum())


def expert_pruning(seeds: int = 20) -> tuple[float, float]:
    """Return mean output errors if REAP's score, or how often an expert fires, decides which half is removed."""
    errors = torch.tensor([prune(seed) for seed in range(seeds)]).mean(dim=0)
    return float(errors[0]), float(errors[1])


def prune(seed: int, experts: int = 8, size: int = 32) -> list[float]:
    """Return the errors of both criteria on a mixture of linear experts, two for each token (arXiv 2510.13999)."""
    rng = torch.Generator().manual_seed(seed)
    x, router = (torch.randn(n, size, generator=rng) for n in (512, experts))
    W = torch.randn(experts, size, size, generator=rng) * torch.rand(experts, 1, 1, generator=rng)
    logits = x @ router.T / size**0.5 + torch.randn(experts, generator=rng)
    outputs = torch.einsum("ti,eoi->teo", x, W)
    gates = top_gates(logits)
    fires = (gates > 0).sum(dim=0)
    reap = (gates * outputs.norm(dim=-1)).sum(dim=0) / fires.clamp(min=1)
    y, errors = (gates[..., None] * outputs).sum(dim=1), []
    for score in (reap, fires.float()):
        left = logits.index_fill(1, score.argsort()[: experts // 2], -torch.inf)
        pruned = (top_gates(left)[..., None] * outputs).sum(dim=1)
        errors.append(float((pruned - y).square().sum() / y.square().sum()))
    return errors


def top_gates(logits: Tensor) -> Tensor:
    """Return weights [tokens, experts] of each token's two experts, which add up to 1."""
    top = logits.topk(2, dim=1)
    return torch.zeros_like(logits).scatter(1, top.indices, top.values.softmax(dim=1))
