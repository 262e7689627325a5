"""The transform of a group of channels that is the best for inputs and weights together (WUSH, arXiv 2512.00956)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from quantize.kernels.hadamard import hadamard_factors


def wush(X: Tensor, weights: Iterable[Tensor], block: int, damping: float = 0.01) -> Tensor:
    """Return T, float64 [K/b, b, b], so that rows x T and weights W T⁻ᵀ have the same second moments in each block.

    With H = XᵀX / n = RᵀR (R upper triangular) and R Wᵀ / √N = V S Uᵀ of a block, A = Had S^½ Vᵀ R⁻ᵀ multiplies a
    column of inputs, and A⁻ᵀ = Had S^-½ Vᵀ R one of weights; both second moments are then Had S Hadᵀ. A block that
    is always zero on one side keeps T = 1.

    Args:
        X: inputs [n, K].
        weights: those [N, K] of all linears that read the inputs.
        block: b, a divisor of K.
        damping: the parts of the mean diagonal of H and of the mean of S that are added to them (the authors' code).
    Source: section 3 of the paper, and its authors' code, `src/quantization/wush_gptq.py`.
    """
    H = second_moment([X], block)
    G = second_moment(weights, block)
    eye = torch.eye(block, dtype=H.dtype, device=H.device)
    used = (H.diagonal(dim1=1, dim2=2).sum(1) > 0) & (G.diagonal(dim1=1, dim2=2).sum(1) > 0)
    H, G = (torch.where(used[:, None, None], x, eye) for x in (H, G))
    H = H + damping * H.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * eye
    R = torch.linalg.cholesky(H, upper=True)
    squares, V = (x.flip(-1) for x in torch.linalg.eigh(R @ G @ R.mT))  # the largest first, as of an SVD
    S = squares.clamp(min=0).sqrt()
    S = S + damping * S.mean(1, keepdim=True)
    hadamard = torch.kron(*hadamard_factors(block)).to(H)
    A = hadamard @ (S.sqrt()[:, :, None] * torch.linalg.solve_triangular(R, V, upper=True).mT)
    return torch.where(used[:, None, None], A.mT, eye)


def second_moment(rows: Iterable[Tensor], block: int) -> Tensor:
    """Return XᵀX / n of each block of the columns of all rows X [n, K] together, float64 [K/b, b, b]."""
    total, count = torch.zeros(()), 0
    for X in rows:
        blocks = X.double().unflatten(1, (-1, block)).transpose(0, 1)
        total, count = total.to(blocks) + blocks.mT @ blocks, count + len(X)
    return total / count
