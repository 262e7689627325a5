"""Orthogonal matrices on runs of channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class BlockRotation:
    """T = diag(blocks), a `Transform` that multiplies each run of `b` channels by an orthogonal matrix.

    `blocks` is [K/b, b, b] with a matrix for each run (head), or [b, b] with one matrix for all runs. [K, K] is a
    rotation of all channels.
    """

    blocks: Tensor

    def apply(self, rows: Tensor) -> Tensor:
        """`rows @ T`."""
        return multiply_blocks(rows, self.blocks)

    apply_inverse_transpose = apply  # T⁻ᵀ = T

    def invert(self, x: Tensor) -> Tensor:
        """`x @ Tᵀ`."""
        return multiply_blocks(x, self.blocks.mT)


def multiply_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """Return `x @ diag(blocks)`.

    Args:
        x: [..., K]; the result keeps its dtype and device.
        blocks: [K/b, b, b], or [b, b] for all runs.

    Raises:
        RuntimeError: the blocks do not cover K channels.
    """
    runs = x.unflatten(-1, (-1, blocks.shape[-1]))
    product = runs @ blocks.to(x) if blocks.ndim == 2 else torch.einsum("...nb,nbc->...nc", runs, blocks.to(x))
    return product.flatten(-2)


def reflect(x: Tensor) -> Tensor:
    """Return `x @ H` [..., K]; H is the reflection that swaps the first axis and 1/√K, so its first row is uniform."""
    size = x.shape[-1]
    u = torch.full((size,), -(size**-0.5), dtype=x.dtype, device=x.device)
    u[0] += 1
    length = (u @ u).clamp(min=torch.finfo(x.dtype).tiny)  # a single channel is not moved
    return x - 2 / length * (x @ u)[..., None] * u
