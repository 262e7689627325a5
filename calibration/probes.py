"""Probes are two small inputs on which a model is compared with what is made of it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quantize.calibration.data import Row, Samples

PROBE_TOKENS = 32


def verification_inputs(samples: Samples, vocabulary: int, seed: int) -> list[Row]:
    """Return two different inputs of batch 1: the start of the last sample, and random data of the same shapes.

    Of samples that are taken whole, only numbers are random: integers may be places or kinds that belong together, and
    come from another sample.
    """
    row, rng = samples.rows[-1], np.random.default_rng(seed)
    if samples.whole:
        alike = [other for other in samples.rows if all(other[name].shape == x.shape for name, x in row.items())]
        second = {k: normal_like(x, rng) if x.is_floating_point() else alike[0][k] for k, x in row.items()}
        return [{name: x[None] for name, x in found.items()} for found in (row, second)]
    given = {name: (x if x.is_floating_point() else x[:PROBE_TOKENS])[None] for name, x in row.items()}
    return [given, {name: random_like(x, vocabulary, rng) for name, x in given.items()}]


def random_like(x: Tensor, vocabulary: int, rng: np.random.Generator) -> Tensor:
    """Return random ids below the vocabulary, or normal numbers like x."""
    if not x.is_floating_point():
        return torch.from_numpy(rng.integers(vocabulary, size=x.shape))
    return normal_like(x, rng)


def normal_like(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Return normal numbers with the mean and deviation of x (1 if constant)."""
    deviation = float(x.std(correction=0)) or 1.0
    return torch.from_numpy(np.asarray(rng.normal(float(x.mean()), deviation, size=x.shape))).float()
