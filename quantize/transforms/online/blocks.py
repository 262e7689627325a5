"""A matrix for each block of channels in front of a linear."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from quantize.transforms.block_rotation import multiply_blocks
from quantize.transforms.online.base import Online


class Blocks(Online):
    """x → x diag(T), with an invertible matrix for each block of neighbouring channels.

    Shapes: matrices float32 [K/b, b, b].
    """

    kind: ClassVar[str] = "blocks"
    matrices: Tensor

    def __init__(self, matrices: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrices", matrices.float())

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., K]."""
        return multiply_blocks(x, self.matrices)

    def weight(self, W: Tensor) -> Tensor:
        """Return `W @ T⁻ᵀ` in the dtype of W, of the matrices as they are stored."""
        return multiply_blocks(W, torch.linalg.inv(self.matrices.double()).mT)

    def settings(self) -> dict[str, Any]:
        """Return the kind alone; the matrices are saved as a tensor."""
        return {"kind": self.kind}

    def cost(self, columns: int) -> int:
        """Return the multiply-adds of a product with a block for each channel."""
        return columns * self.matrices.shape[-1]
