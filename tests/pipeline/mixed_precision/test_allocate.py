"""The allocation is the best of all within the budget, beside a search through all of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from quantize.pipeline.mixed_precision import allocate as module
from quantize.pipeline.mixed_precision.allocate import allocate


def best(bits, losses, budget):
    """The least loss of all allocations within the budget."""
    choices = itertools.product(*(range(len(row)) for row in bits))
    fits = (c for c in choices if sum(row[o] for row, o in zip(bits, c, strict=True)) <= budget)
    return min(sum(row[o] for row, o in zip(losses, c, strict=True)) for c in fits)


@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    bits, losses = rng.integers(1, 30, (5, 4)).tolist(), rng.random((5, 4)).tolist()
    for budget in (sum(map(min, bits)), 60, 90, 1000):
        if budget < sum(map(min, bits)):
            continue
        chosen = allocate(bits, losses, budget)
        assert sum(row[o] for row, o in zip(bits, chosen, strict=True)) <= budget
        assert sum(row[o] for row, o in zip(losses, chosen, strict=True)) == pytest.approx(best(bits, losses, budget))


def test_large_budgets_are_counted_in_steps_and_never_exceeded(monkeypatch):
    monkeypatch.setattr(module, "STEPS", 50)
    rng = np.random.default_rng(1)
    bits, losses = (rng.integers(1000, 9000, (6, 3))).tolist(), rng.random((6, 3)).tolist()
    budget = int(1.3 * sum(map(min, bits)))
    chosen = allocate(bits, losses, budget)
    assert sum(row[o] for row, o in zip(bits, chosen, strict=True)) <= budget
    found = sum(row[o] for row, o in zip(losses, chosen, strict=True))
    assert found <= best(bits, losses, int(0.97 * budget))


def test_of_options_that_lose_the_same_the_smaller_is_taken():
    assert allocate([[5, 3, 9]], [[1.0, 1.0, 1.0]], 100) == [1]


def test_less_than_the_least_is_refused():
    with pytest.raises(ValueError, match="6 bits are less"):
        allocate([[4, 8], [3, 9]], [[1.0, 0.0]] * 2, 6)
