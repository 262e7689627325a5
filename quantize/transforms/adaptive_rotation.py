"""Hadamard or dual rotation, decided site by site (adaptive rotation scheme of LRQ-DiT, arXiv 2508.03485)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from quantize.kernels.ops import quantize_per_token
from quantize.transforms.dual_rotation import DualRotation, dual_rotation
from quantize.transforms.fold import Rotation, Transform

HELD_BACK = 0.25  # the part of the rows that is kept back from the search, for the comparison
STANDARD_ERRORS = 2  # standard errors by which the dual rotation must win; else the faster Hadamard matrix is taken


def choose_rotation(X: Tensor, threshold: float) -> Literal["hadamard", "dual"]:
    """Apply the paper's criterion: Hadamard where J = ‖X‖_F / √(rows · K) is below the threshold (1 in the paper).

    J depends on the scale of X: behind a norm whose gain is folded it is 1 whatever the outliers are, and one factor on
    all of X decides the answer. The paper's threshold fits its own models; without one `adaptive_rotation` measures.
    """
    return "hadamard" if rms(X) < threshold else "dual"


def rms(X: Tensor) -> float:
    """Return J = ‖X‖_F / √(number of elements); X holds at least one element."""
    return float(X.double().square().mean().sqrt())


def adaptive_rotation(X: Tensor, threshold: float | None, generator: torch.Generator) -> Rotation | DualRotation:
    """Return a random Hadamard matrix or a dual rotation for activations, whichever suits them.

    Without a threshold both are made from three rows in four and compared on the other rows, with each token quantized
    to 4 bits. The dual rotation is taken if its mean error is smaller by two standard errors of the paired difference.
    This comparison does not depend on scale; a tie, as on normal data, goes to the Hadamard matrix.

    Args:
        X: activations [..., K], at least 8 rows if there is no threshold.
        threshold: the threshold of `choose_rotation`; None measures.
        generator: what draws the signs, the rows held back, and the search.
    """
    rows = X.detach().reshape(-1, X.shape[-1])
    signs = torch.randint(0, 2, (X.shape[-1],), generator=generator).double() * 2 - 1
    hadamard = Rotation(signs, X.shape[-1])
    if threshold is not None:
        return hadamard if choose_rotation(rows, threshold) == "hadamard" else dual_rotation(rows, generator)
    rows = rows[torch.randperm(len(rows), generator=generator)]
    held_back, seen = rows.tensor_split([round(len(rows) * HELD_BACK)])
    dual = dual_rotation(seen, generator)
    return dual if is_better(dual, hadamard, held_back) else hadamard


def is_better(one: Transform, other: Transform, X: Tensor) -> bool:
    """Return whether the mean `token_error` of X [rows, K] after `one` is smaller by two standard errors; rows ≥ 2."""
    if len(X) < 2:
        return False
    gain = token_error(other.apply(X)) - token_error(one.apply(X))
    return bool(gain.mean() > STANDARD_ERRORS * gain.std() / len(gain) ** 0.5)


def token_error(x: Tensor) -> Tensor:
    """Return ‖x̂ - x‖² / ‖x‖² of each row, [..., K] → [...], x̂ being x in symmetric 4 bits; it is 0 for zeros."""
    x = x.double()
    q, scale, _ = quantize_per_token(x, 4, symmetric=True)
    energy = x.square().sum(dim=-1)
    return (q * scale - x).square().sum(dim=-1) / energy.clamp(min=torch.finfo(x.dtype).tiny)
