"""A Hadamard transform in front of a linear."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantize.kernels.hadamard import hadamard_factors, hadamard_transform, kronecker_transform
from quantize.transforms.online.base import Online


class Hadamard(Online):
    """`x @ (I ⊗ H ⊗ I_stride)`, H orthogonal of order `size` (QuaRot, arXiv 2404.00456); see `kernels/hadamard.py`.

    The Kronecker factors of H are buffers that are never saved.
    """

    kind: ClassVar[str] = "hadamard"
    a: Tensor
    b: Tensor

    def __init__(self, size: int, stride: int = 1) -> None:
        super().__init__()
        self.size, self.stride = size, stride
        a, b = hadamard_factors(size)
        self.register_buffer("a", a.float(), persistent=False)
        self.register_buffer("b", b.float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., K]; in float64 with exact factors, which the buffers are not."""
        if x.dtype == torch.float64:
            return hadamard_transform(x, self.size, self.stride)
        return kronecker_transform(x, self.a.to(x), self.b.to(x), self.stride)

    def weight(self, W: Tensor) -> Tensor:
        """Return `W @ T`, since H is orthogonal and T⁻ᵀ = T, in the dtype of W."""
        return hadamard_transform(W, self.size, self.stride)

    def settings(self) -> dict[str, Any]:
        """Return the kind, the size and the stride."""
        return {"kind": self.kind, "size": self.size, "stride": self.stride}

    def cost(self, columns: int) -> int:
        """Return K (|a| + |b|), |a| and |b| being the orders of the factors; a factor of order one costs nothing."""
        return columns * sum(len(factor) for factor in (self.a, self.b) if len(factor) > 1)


@functools.cache
def hadamard(size: int, stride: int = 1) -> Hadamard:
    """Return the transform of this size and stride, which is the same object for all linears."""
    return Hadamard(size, stride)
