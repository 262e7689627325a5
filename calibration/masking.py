"""A masked-diffusion language model is calibrated, and scored, on text in which it has tokens to find (2508.14896)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from quantize.calibration.data import Samples
from quantize.errors import UsageError

LEAST, MOST = 0.1, 0.9  # the part of a row's tokens that is masked


def mask_samples(samples: Samples, mask_id: int, vocabulary: int, seed: int) -> Samples:
    """Return samples of token ids with a part of each one's tokens masked, drawn evenly from 0.1 to 0.9.

    Args:
        samples: rows of token ids alone.
        mask_id: the token that stands for one to find.
        vocabulary: the number that all ids lie below.
        seed: the seed of the draw.

    Raises:
        UsageError: the model has no such token, or the rows hold more than token ids.
    """
    if mask_id >= vocabulary:
        raise UsageError(f"recipe: calibration.mask_id {mask_id} is no token; give an id from 0 to {vocabulary - 1}")
    if samples.whole or any(len(row) > 1 or x.is_floating_point() for row in samples.rows for x in row.values()):
        raise UsageError(
            "recipe: calibration.mask_id masks rows of token ids alone; leave it out and give rows that are masked"
        )
    rng = np.random.default_rng(seed)
    rows = tuple({name: mask(x, mask_id, rng) for name, x in row.items()} for row in samples.rows)
    return replace(samples, rows=rows, leading=())


def mask(ids: Tensor, mask_id: int, rng: np.random.Generator) -> Tensor:
    """Return token ids [tokens] with a part of them masked."""
    chosen = masked_places(len(ids), rng.uniform(LEAST, MOST), rng)
    return torch.where(chosen, mask_id, ids)


def masked_places(count: int, part: float, rng: np.random.Generator) -> Tensor:
    """Return which of some tokens are masked, bool [count]: that part of them, and one at least."""
    found = torch.zeros(count, dtype=torch.bool)
    found[torch.from_numpy(rng.permutation(count)[: max(1, round(part * count))])] = True
    return found
