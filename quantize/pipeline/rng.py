"""Private random generators give the same numbers for the same seed and keys, whatever else was drawn."""

from __future__ import annotations

import numpy as np
import torch


def derived_generator(seed: int, *keys: int) -> torch.Generator:
    """Return a generator that depends on a seed ≥ 0 and keys ≥ 0 alone."""
    state = np.random.SeedSequence([seed, *keys]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
