"""A case is one product on random data, and how it is computed in another way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One product on random data.

    Attributes:
        run: computes the product.
        expected: computes the product in another way, in float64 or from exact integers.
    """

    run: Callable[[], Tensor]
    expected: Callable[[], Tensor]


def floats(*shape: int, rng: torch.Generator, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Draw from the normal distribution."""
    return torch.randn(shape, generator=rng, device=rng.device).to(dtype)


def integers(*shape: int, bits: int, rng: torch.Generator) -> Tensor:
    """Draw int8 uniformly from all integers of so many bits."""
    half = 1 << (bits - 1)
    return torch.randint(-half, half, shape, generator=rng, device=rng.device, dtype=torch.int8)
