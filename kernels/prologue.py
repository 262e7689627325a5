"""Kernels that quantize activations do some steps in front of it, in the same pass over memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.kernels.hadamard import hadamard_transform

ROWS = 16  # the least that a product on tensor cores takes
LARGEST_TILE = 4096  # columns
LARGEST_ORDER = 128  # of a matrix that fits shared memory in float32, too; 256 does not fit that of any GPU


def fuses(order: int) -> bool:
    """Return whether a Hadamard transform of neighbours, of this order, runs inside the quantizer."""
    return 16 <= order <= LARGEST_ORDER and order & (order - 1) == 0


@dataclass(frozen=True)
class Prologue:
    """The steps that are done to activations [M, K] before their quantizer, in this order.

    Attributes:
        gain: the gain [K] of an RMSNorm, in the dtype of the activations; None for no norm.
        epsilon: the epsilon of the norm.
        hadamard: the order, for which `fuses` holds, of Sylvester's matrix, which mixes that many neighbours; 0 for
            none.
        order: int64 [K], the order in which columns are quantized; None for their own order.
        smooth: float32 [K] in that order, the divisors of the columns; needs `order`.
    """

    gain: Tensor | None = None
    epsilon: float = 0.0
    hadamard: int = 0
    order: Tensor | None = None
    smooth: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the tensors as kernels take them."""
        return self.gain, self.order, self.smooth

    def tile(self, M: int, K: int, at_least: int) -> tuple[int, int]:
        """Return rows and columns of a program's tile; the columns are a power of two and at least so many."""
        if not self.hadamard:
            return 1, max(min(1 << (K - 1).bit_length(), LARGEST_TILE), at_least)
        block_k = max(self.hadamard, at_least) if M >= ROWS else max(ROWS * self.hadamard, at_least)
        return (ROWS if M >= ROWS else 1), block_k

    def applied(self, x: Tensor) -> Tensor:
        """Return X [M, K] as it reaches the quantizer, float32 [M, K], in plain torch."""
        if self.gain is not None:
            wide = x.float()
            normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
            x = normed.to(x.dtype) * self.gain
        x = x.float()
        if self.hadamard:
            x = hadamard_transform(x, self.hadamard)
        x = x if self.order is None else x[:, self.order]
        return x if self.smooth is None else x / self.smooth


NOTHING = Prologue()
