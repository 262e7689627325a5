"""Kernels that quantize activations do some steps in front of it, in the same pass over memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.kernels.hadamard import hadamard_transform

ROWS = 16  # the least that a product on tensor cores takes
LARGEST_TILE = 4096  # columns


def fuses(order: int) -> bool:
    """Return whether a Hadamard transform of neighbours, of this order, runs inside the quantizer."""
    return 16 <= order <= 256 and order & (order - 1) == 0


@dataclass(frozen=True)
class Prologue:
    """What is done to activations [M, K] in front of their quantizer, in this order.

    Attributes:
        gain: [K] in the dtype of the activations, of an RMSNorm; None for no norm.
        epsilon: of the norm.
        hadamard: order, for which `fuses`, of Sylvester's matrix, which mixes that many neighbours; 0 for none.
        order: int64 [K], the columns in the order in which they are quantized; None as they are.
        smooth: float32 [K] in that order, what they are divided by; goes with `order`.
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
