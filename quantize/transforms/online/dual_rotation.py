"""A dual rotation in front of a linear."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from quantize.transforms.dual_rotation import DualRotation
from quantize.transforms.online.base import Online


class Dual(Online):
    """x → x R1 P R2, with R1 and R2 block-diagonal and P a permutation (DuQuant, arXiv 2406.01721).

    Shapes: first, second [K/b, b, b]; permutation int64 [K].
    """

    kind: ClassVar[str] = "dual"
    first: Tensor
    permutation: Tensor
    second: Tensor

    def __init__(self, first: Tensor, permutation: Tensor, second: Tensor) -> None:
        super().__init__()
        self.register_buffer("first", first.float())
        self.register_buffer("permutation", permutation)
        self.register_buffer("second", second.float())

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., K]."""
        return DualRotation(self.first, self.permutation, self.second).apply(x)

    def weight(self, W: Tensor) -> Tensor:
        """Return `W @ T⁻ᵀ` in the dtype of W; the stored matrices are orthogonal only up to float32."""
        first, second = (torch.linalg.inv(x.double()).mT for x in (self.first, self.second))
        return DualRotation(first, self.permutation, second).apply(W)

    def settings(self) -> dict[str, Any]:
        """Return the kind alone; all else is saved as tensors."""
        return {"kind": self.kind}

    def cost(self, columns: int) -> int:
        """Return the multiply-adds of two products with blocks."""
        return 2 * columns * self.first.shape[-1]
