"""Codebooks of papers as plain sets of levels, each value rounded to the nearest: how well a set of levels can do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product

import torch
from torch import Tensor

from quantize.kernels.reference import integer_range

SCALES = torch.linspace(0.2, 1.0, 81).tolist()  # parts of a row's largest magnitude


def nearest(W: Tensor, levels: Tensor) -> Tensor:
    """Each value of W [R, K] replaced by the nearest of its row's levels [R, L]."""
    columns = (W[..., None] - levels[:, None]).abs().argmin(dim=-1)
    return levels.gather(1, columns)


def error(W: Tensor, codebooks: Iterable[Tensor]) -> float:
    """Relative squared error of W [R, K] when each row takes the best of some codebooks [R, L]."""
    errors = [(nearest(W, levels) - W).square().sum(dim=1) for levels in codebooks]
    return float(torch.stack(errors).amin(dim=0).sum() / W.square().sum())


def uniform(bits: int) -> Tensor:
    """Integers of two's complement [2^bits], up to 1."""
    low, high = integer_range(bits)
    return torch.arange(low, high + 1) / high


def powers(bits: int, base: float) -> Tensor:
    """0 and ±base^-k [2^bits - 1]: powers of two, or of √2 as POST has them (arXiv 2504.17263)."""
    sizes = torch.pow(base, -torch.arange(2 ** (bits - 1) - 1.0))
    return torch.cat([torch.zeros(1), sizes, -sizes])


def dint4() -> Tensor:
    """INT4 that gives up 7 and -8 for ±½ (arXiv 2311.05161, whose own table is not public): 16 levels, up to 1."""
    sizes = torch.tensor([0.5, 1, 2, 3, 4, 5, 6])
    return torch.cat([torch.zeros(1), sizes, -sizes, torch.tensor([-7.0])]) / 6


def scaled(W: Tensor, levels: Tensor, scales: Iterable[float] = SCALES) -> Iterator[Tensor]:
    """Levels [L] up to 1 → codebooks [R, L] that reach parts of each row's largest magnitude."""
    largest = W.abs().amax(dim=1, keepdim=True)
    return (scale * largest * levels for scale in scales)


def min_max(W: Tensor, bits: int) -> Iterator[Tensor]:
    """The one uniform codebook from each row's smallest to its largest value."""
    low, high = W.amin(dim=1, keepdim=True), W.amax(dim=1, keepdim=True)
    yield low + (high - low) * torch.linspace(0, 1, 2**bits)


def tlq(W: Tensor, bits: int) -> Iterator[Tensor]:
    """LRQ-DiT's codebooks: uniform in log2(|w| + η) on either side of zero, upper ends clipped at quantiles.

    Half of the 2^bits codes to each sign; the paper tries the same η and quantiles (arXiv 2508.03485).
    """
    for eta, quantile in product((0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0), (0.98, 0.99, 0.999, 1.0)):
        yield torch.cat([sign * half(sign * W, bits, eta, quantile) for sign in (1, -1)], dim=1)


def half(W: Tensor, bits: int, eta: float, quantile: float) -> Tensor:
    """Levels [R, 2^(bits-1)] for the positive values of each row."""
    positive = W.masked_fill(W <= 0, torch.nan)
    low = (positive.nan_to_num(torch.inf).amin(dim=1, keepdim=True) + eta).log2()
    high = (positive.nanquantile(quantile, dim=1, keepdim=True) + eta).log2()
    return 2 ** (low + (high - low) * torch.linspace(0, 1, 2 ** (bits - 1))) - eta
