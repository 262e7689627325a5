"""The codebooks of papers are plain sets of levels; rounding to the nearest shows how well a set of levels can do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product

import torch
from torch import Tensor

from quantize.kernels.reference import integer_range

SCALES = torch.linspace(0.2, 1.0, 81).tolist()  # parts of a row's largest magnitude


def nearest(W: Tensor, levels: Tensor) -> Tensor:
    """Replace each value of W [R, K] by the nearest of its row's levels [R, L]."""
    columns = (W[..., None] - levels[:, None]).abs().argmin(dim=-1)
    return levels.gather(1, columns)


def error(W: Tensor, codebooks: Iterable[Tensor]) -> float:
    """Return the relative squared error of W [R, K] if each row takes the best of some codebooks [R, L]."""
    errors = [(nearest(W, levels) - W).square().sum(dim=1) for levels in codebooks]
    return float(torch.stack(errors).amin(dim=0).sum() / W.square().sum())


def uniform(bits: int) -> Tensor:
    """Return the integers of two's complement, [2^bits], scaled to at most 1."""
    low, high = integer_range(bits)
    return torch.arange(low, high + 1) / high


def powers(bits: int, base: float) -> Tensor:
    """Return 0 and ±base^-k, [2^bits - 1], with base 2, or √2 as in POST (arXiv 2504.17263)."""
    sizes = torch.pow(base, -torch.arange(2 ** (bits - 1) - 1.0))
    return torch.cat([torch.zeros(1), sizes, -sizes])


def dint4() -> Tensor:
    """Return 16 levels up to 1: INT4 with ±½ for 7 and -8 (arXiv 2311.05161, whose own table is not public)."""
    sizes = torch.tensor([0.5, 1, 2, 3, 4, 5, 6])
    return torch.cat([torch.zeros(1), sizes, -sizes, torch.tensor([-7.0])]) / 6


def scaled(W: Tensor, levels: Tensor, scales: Iterable[float] = SCALES) -> Iterator[Tensor]:
    """Scale levels [L] up to 1 to codebooks [R, L] that reach parts of each row's largest magnitude."""
    largest = W.abs().amax(dim=1, keepdim=True)
    return (scale * largest * levels for scale in scales)


def min_max(W: Tensor, bits: int) -> Iterator[Tensor]:
    """Yield the only uniform codebook from each row's smallest to its largest value."""
    low, high = W.amin(dim=1, keepdim=True), W.amax(dim=1, keepdim=True)
    yield low + (high - low) * torch.linspace(0, 1, 2**bits)


def tlq(W: Tensor, bits: int) -> Iterator[Tensor]:
    """Yield LRQ-DiT's codebooks: uniform in log2(|w| + η) on either side of zero, with upper ends at quantiles.

    Each sign has half of the 2^bits codes. The paper tries the same η and quantiles (arXiv 2508.03485).
    """
    for eta, quantile in product((0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0), (0.98, 0.99, 0.999, 1.0)):
        yield torch.cat([sign * half(sign * W, bits, eta, quantile) for sign in (1, -1)], dim=1)


def half(W: Tensor, bits: int, eta: float, quantile: float) -> Tensor:
    """Return levels [R, 2^(bits-1)] for the positive values of each row."""
    positive = W.masked_fill(W <= 0, torch.nan)
    low = (positive.nan_to_num(torch.inf).amin(dim=1, keepdim=True) + eta).log2()
    high = (positive.nanquantile(quantile, dim=1, keepdim=True) + eta).log2()
    return 2 ** (low + (high - low) * torch.linspace(0, 1, 2 ** (bits - 1))) - eta
