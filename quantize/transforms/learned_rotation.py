"""Rotations that are learned from activations alone, without the model (DartQuant, arXiv 2511.04063)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from quantize.transforms.block_rotation import reflect
from quantize.transforms.fold import CentredRotation, Rotation
from quantize.transforms.kurtosis import UNIFORM, kurtosis

Objective = Literal["whip", "kurtosis"]
BATCH = 512  # tokens in each step
LEARNING_RATE = 3e-3  # Adam's at the first step; entries of Z are about 1/√K


@torch.enable_grad()
def learn_rotation(
    X: Tensor,
    objective: Objective,
    generator: torch.Generator,
    steps: int,
    centred: bool = False,
) -> Tensor:
    """Learn R that makes X R flat, by QR-Orth: R is the orthogonal factor of a free matrix Z, which Adam moves.

    Z starts at a random Hadamard matrix, and the learning rate falls to zero as a cosine. A step runs in float32 on
    tokens drawn at random; the result is the float64 factor of the last Z.

    Args:
        X: activations [..., K], at least one row.
        objective: `whip` or `kurtosis`, the functions `whip` and `kurtail` below.
        generator: what draws the signs of the Hadamard matrix and the tokens.
        steps: the number of steps of Adam; 0 returns the Hadamard matrix.
        centred: whether R 1 = 1, so that a LayerNorm lets R through; only the complement of the ones is learned then.

    Returns:
        R [K, K] float64; x R is the rotated token.
    """
    rows = X.detach().reshape(-1, X.shape[-1]).float()
    Z = starting_point(X.shape[-1], generator, centred).to(rows).requires_grad_()
    optimizer = torch.optim.Adam([Z], LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for _ in range(steps):
        tokens = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
        optimizer.zero_grad()
        OBJECTIVES[objective](rotate(tokens, orthogonal_factor(Z), centred)).backward()
        optimizer.step()
        schedule.step()
    identity = torch.eye(X.shape[-1], dtype=torch.float64, device=rows.device)
    return rotate(identity, orthogonal_factor(Z.detach().double()), centred)


def whip(x: Tensor) -> Tensor:
    """Return the mean over tokens of Σ_j exp(-|x_j|), x [..., K], DartQuant's Whip loss.

    It pushes small values away from zero, and under a fixed norm it is least where all |x_j| are equal. Each token is
    first given the norm √K, because otherwise the unit of the activations would decide which values are small.
    """
    x = x / x.square().mean(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny).sqrt()
    return x.abs().neg().exp().sum(dim=-1).mean()


def kurtail(x: Tensor) -> Tensor:
    """Return the mean over tokens of (κ(x) - 1.8)², x [..., K] (KurTail, arXiv 2503.01483).

    1.8 is κ of a uniform distribution. κ is taken over the channels of a token, because one grid has to fit one token.
    """
    return (kurtosis(x) - UNIFORM).square().mean()


OBJECTIVES: dict[Objective, Callable[[Tensor], Tensor]] = {"whip": whip, "kurtosis": kurtail}


def rotate(x: Tensor, Q: Tensor, centred: bool) -> Tensor:
    """Return `x @ R`: R is Q [K, K], or, centred, H diag(1, Q) H with Q [K-1, K-1]; H swaps 1/√K and the first axis."""
    if not centred:
        return x @ Q
    x = reflect(x)
    return reflect(torch.cat((x[..., :1], x[..., 1:] @ Q), dim=-1))


def starting_point(size: int, generator: torch.Generator, centred: bool) -> Tensor:
    """Return Q, float64, for which R is a random Hadamard matrix, followed by a reflection if it must keep the ones."""
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    identity = torch.eye(size, dtype=torch.float64)
    if not centred:
        return Rotation(signs, size).apply(identity)
    return reflect(reflect(CentredRotation(signs, size).apply(identity)).T).T[1:, 1:]


def orthogonal_factor(Z: Tensor) -> Tensor:
    """Return Q of Z = Q R with a positive diagonal of R, which makes Q unique: an orthogonal Z is its own factor."""
    Q, R = torch.linalg.qr(Z)
    unique: Tensor = Q * torch.where(R.diagonal() < 0, -1.0, 1.0).to(Q)
    return unique
