"""Two small inputs that prove what is made of a model."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quantize.calibration.data import Row

PROBE_TOKENS = 32


def verification_inputs(row: Row, vocabulary: int, seed: int) -> list[Row]:
    """Two different inputs of batch 1: a sample, of its token ids the start, and random data of the same shapes."""
    given = {name: (x if x.is_floating_point() else x[:PROBE_TOKENS])[None] for name, x in row.items()}
    rng = np.random.default_rng(seed)
    return [given, {name: random_like(x, vocabulary, rng) for name, x in given.items()}]


def random_like(x: Tensor, vocabulary: int, rng: np.random.Generator) -> Tensor:
    """Ids below the vocabulary, or normal numbers with the mean and deviation of x (1 where it is constant)."""
    if not x.is_floating_point():
        return torch.from_numpy(rng.integers(vocabulary, size=x.shape))
    deviation = float(x.std(correction=0)) or 1.0
    return torch.from_numpy(rng.normal(float(x.mean()), deviation, size=x.shape)).float()
