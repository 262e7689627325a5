"""Claims on WUSH (arXiv 2512.00956): one linear in MXFP4, on both sides, with correlated inputs and uneven weights."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.claims.claim import Claim
from quantize.quantizers.base import fake_quantize_weight
from quantize.scheme.scheme import ActivationArgs, WeightArgs
from quantize.transforms.online import Blocks, Hadamard, InputTransform, Online
from quantize.transforms.wush import wush

TOKENS, K, N, BLOCK = 512, 256, 256, 32
W4, A4 = WeightArgs(num_bits=4, format="mxfp4", group_size=BLOCK), ActivationArgs(num_bits=4, format="mxfp4")
HADAMARD = Hadamard(BLOCK)


def draw() -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs to fit on and others to measure on [tokens, K], and weights [N, K] with channels of all sizes."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(K, K, generator=generator) / K**0.5 + torch.eye(K)
    X = torch.randn(2 * TOKENS, K, generator=generator) @ mix
    W = torch.randn(N, K, generator=generator) * torch.randn(K, generator=generator).exp()
    return X[:TOKENS], X[TOKENS:], W


def error(*online: Online) -> float:
    """Return ‖Q(X) Q(W)ᵀ - X Wᵀ‖² / ‖X Wᵀ‖² on inputs that were not fitted."""
    _, X, W = draw()
    transform = InputTransform(online, A4)
    found = transform.quantized(X) @ fake_quantize_weight(transform.fold_into_weight(W), W4).T
    return float((found - X @ W.T).square().sum() / (X @ W.T).square().sum())


def whole() -> float:
    """Return the error of WUSH."""
    X, _, W = draw()
    return error(Blocks(wush(X, [W], BLOCK)))


def diagonal() -> float:
    """Return the error of `rescale`'s diagonal with a Hadamard matrix behind it."""
    X, _, W = draw()
    scale = (W.square().sum(0) / X.square().sum(0)) ** 0.25
    return error(Blocks(torch.diag_embed(scale.unflatten(0, (-1, BLOCK)))), HADAMARD)


CLAIMS = (
    Claim("WUSH ≤ 0.9 a Hadamard matrix (MXFP4)", "2512.00956", 0.9, True, lambda: (whole(), error(HADAMARD))),
    Claim(
        "balanced channels and a Hadamard matrix ≤ 0.9 the matrix alone (MXFP4)",
        "2512.00956",
        0.9,
        True,
        lambda: (diagonal(), error(HADAMARD)),
    ),
    Claim(
        "WUSH ≤ 0.9 balanced channels and a Hadamard matrix (MXFP4)",
        "2512.00956",
        0.9,
        False,
        lambda: (whole(), diagonal()),
    ),
)
