"""What calibration collects: pure accumulators over the rows of an activation, which can be merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor


class Statistic(Protocol):
    """Accumulates over activations [..., K]; `a.merge(b)` equals having seen the data of both."""

    def update(self, x: Tensor) -> None:
        """Take in one batch of activations."""

    def merge(self, other: Self) -> None:
        """Take in what another accumulator has seen."""


@dataclass
class Absmax:
    """Largest magnitude of each channel: `value` [K] ≥ 0."""

    value: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Take in [..., K]."""
        largest = x.detach().abs().reshape(-1, x.shape[-1]).amax(dim=0)
        self.value = largest if self.value is None else torch.maximum(self.value, largest)

    def merge(self, other: Self) -> None:
        """The larger of both."""
        if other.value is not None:
            self.update(other.value)


@dataclass
class Gram:
    """Sum of outer products: `value` = Σ xᵀx [K, K], over `rows` rows; GPTQ's Hessian is twice it."""

    value: Tensor | None = None
    rows: int = 0

    def update(self, x: Tensor) -> None:
        """Take in [..., K]; summed in float32."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        self._add(x.T @ x, len(x))

    def merge(self, other: Self) -> None:
        """The sum of both."""
        if other.value is not None:
            self._add(other.value, other.rows)

    def _add(self, value: Tensor, rows: int) -> None:
        self.value = value if self.value is None else self.value.add_(value)
        self.rows += rows
