"""Kurtosis says how heavy the tails of activations are."""

from __future__ import annotations

import torch
from torch import Tensor

UNIFORM = 1.8  # κ of the uniform distribution, which an integer grid suits best (KurTail, arXiv 2503.01483)


def kurtosis(x: Tensor) -> Tensor:
    """Return κ = E[(x - μ)⁴] / σ⁴ of each row [..., K], which is at least 1.

    It is 1.8 for a uniform distribution, 3 for a normal one, and n for one outlier among n values.

    Args:
        x: floating point; κ is computed in its dtype. `x.flatten()` gives one figure for a whole tensor.

    Returns:
        κ [...]; 0 where all values are the same.
    """
    deviation = x - x.mean(-1, keepdim=True)
    variance = deviation.square().mean(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    return (deviation / variance.sqrt()).pow(4).mean(-1)
