"""Probes are two small inputs on which a model is compared with what is made of it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quantize.calibration.data import Row

PROBE_TOKENS = 32


def verification_inputs(row: Row, vocabulary: int, seed: int) -> list[Row]:
    """Return two different inputs of batch 1: the start of a sample, and random data of the same shapes."""
    given = {name: (x if x.is_floating_point() else x[:PROBE_TOKENS])[None] for name, x in row.items()}
    rng = np.random.default_rng(seed)
    return [given, {name: random_like(x, vocabulary, rng) for name, x in given.items()}]


def random_like(x: Tensor, vocabulary: int, rng: np.random.Generator) -> Tensor:
    """Return random ids below the vocabulary, or normal numbers with the mean and deviation of x (1 if constant)."""
    if not x.is_floating_point():
        return torch.from_numpy(rng.integers(vocabulary, size=x.shape))
    deviation = float(x.std(correction=0)) or 1.0
    return torch.from_numpy(rng.normal(float(x.mean()), deviation, size=x.shape)).float()
