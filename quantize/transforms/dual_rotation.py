"""The dual rotation that knows where the outliers are: T = R1 P R2 (DuQuant, Lin et al. 2024, arXiv 2406.01721)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.transforms.block_rotation import multiply_blocks, reflect

BLOCK = 128  # DuQuant's and LRQ-DiT's block of channels
STEPS = 256  # DuQuant's limit of greedy steps


@dataclass(frozen=True, eq=False)
class DualRotation:
    """T = R1 P R2, a `Transform` of two block-diagonal rotations and a permutation of channels between them.

    Attributes:
        first: R1, float64 [K/b, b, b], each orthogonal.
        permutation: int64 [K]; x P is `x[..., permutation]`.
        second: R2, like R1.
    """

    first: Tensor
    permutation: Tensor
    second: Tensor

    def apply(self, rows: Tensor) -> Tensor:
        """`rows @ T`."""
        return multiply_blocks(multiply_blocks(rows, self.first)[..., self.permutation], self.second)

    apply_inverse_transpose = apply  # T⁻ᵀ = T

    def invert(self, x: Tensor) -> Tensor:
        """`x @ Tᵀ`."""
        return multiply_blocks(multiply_blocks(x, self.second.mT)[..., self.permutation.argsort()], self.first.mT)


def dual_rotation(X: Tensor, generator: torch.Generator) -> DualRotation:
    """Find R1, P and R2 for activations: R1 spreads outliers within blocks, P deals them out, R2 spreads them again.

    Args:
        X: activations [..., K], at least one row; the search runs in float32.
        generator: what draws the random part of the rotations.
    """
    size = block_size(X.shape[-1])
    rows = X.detach().reshape(-1, X.shape[-1]).float()
    first = greedy_rotation(in_blocks(rows, size), generator, STEPS)
    rows = multiply_blocks(rows, first)
    permutation = zigzag(rows.abs().amax(dim=0), size)
    return DualRotation(first, permutation, greedy_rotation(in_blocks(rows[:, permutation], size), generator, STEPS))


def block_size(columns: int) -> int:
    """Return 128 if it divides the columns, else their largest divisor from 2 to 128, else all of them."""
    return next((d for d in range(min(BLOCK, columns), 1, -1) if columns % d == 0), columns)


def in_blocks(rows: Tensor, size: int) -> Tensor:
    """Reshape [rows, K] into contiguous [K/size, rows, size]."""
    blocks: Tensor = rows.unflatten(-1, (-1, size))
    return blocks.transpose(0, 1).contiguous()


def greedy_rotation(X: Tensor, generator: torch.Generator, steps: int) -> Tensor:
    """Find R of each block, float64 [n, b, b], by spreading the channel with the peak over the block again and again.

    Of R⁰ = I, R¹, ..., R^steps each block keeps the one with the lowest max|X R|, so the peak never grows (DuQuant).
    The steps of all blocks run together, each on a channel of its own.

    Args:
        X: float32 [n, rows, b].
        generator: what draws the one matrix S that all steps and blocks use.
        steps: the number of steps to try.
    """
    S = spreading_matrix(X.shape[-1], generator).to(X.device)
    R = torch.eye(X.shape[-1], dtype=torch.float64, device=X.device).expand(len(X), -1, -1)
    best, channels = R.contiguous(), X.abs().amax(dim=1)
    lowest = channels.amax(dim=-1)
    for _ in range(steps):
        step = swapped(S, channels.argmax(dim=-1))
        X, R = X @ step.to(X), R @ step
        channels = X.abs().amax(dim=1)
        peak = channels.amax(dim=-1)
        best = torch.where((peak < lowest)[:, None, None], R, best)
        lowest = torch.minimum(peak, lowest)
    return best


def spreading_matrix(size: int, generator: torch.Generator) -> Tensor:
    """Return S = diag(1, Q) H, float64 [size, size], whose first row is 1/√size throughout and whose others are random.

    H is the reflection with uniform first row and column, and Q is random orthogonal. The authors' code multiplies by Q
    from the right, after which the first row is no longer uniform; from the left S is just as random and keeps it.
    """
    Q, _ = torch.linalg.qr(torch.randn(size - 1, size - 1, dtype=torch.float64, generator=generator))
    return reflect(torch.block_diag(torch.ones(1, 1, dtype=torch.float64), Q))


def swapped(S: Tensor, channel: Tensor) -> Tensor:
    """Return E S E [n, b, b]; E swaps the first channel and each of `channel` [n], so row `channel` is S's first."""
    index = torch.arange(len(S), device=S.device).repeat(len(channel), 1)
    index.scatter_(1, channel[:, None], 0)
    index[:, 0] = channel
    return S[index[:, :, None], index[:, None, :]]


def zigzag(peaks: Tensor, size: int) -> Tensor:
    """Return a permutation [K] that deals channels out to blocks forth and back, largest first, which evens their sums.

    With n blocks, ranks 0 … n-1 go to blocks 0 … n-1, ranks n … 2n-1 to blocks n-1 … 0, and so on (DuQuant).
    Equal peaks keep their order.

    Args:
        peaks: [K], the largest magnitude of each channel.
        size: the number of channels in a block, which divides K.
    """
    dealt = peaks.argsort(descending=True, stable=True).reshape(size, -1)
    dealt[1::2] = dealt[1::2].flip(-1)
    return dealt.T.flatten()
