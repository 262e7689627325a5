"""The least sum of losses within a budget is found by dynamic programming (the multiple-choice knapsack)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

STEPS = 1 << 15  # in which the budget is counted; a unit's bits are rounded up to whole steps, so it is never exceeded


def allocate(bits: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
    """Return for each unit the number of its option, so that the sum of losses is the least within the budget.

    The least bits of all units come first, and steps count what is spent beyond them, so that rounding costs little.

    Args:
        bits: for each unit what each of its options takes.
        losses: for each unit what each of its options loses, ≥ 0.
        budget: the most bits that all units may take together.

    Raises:
        ValueError: the budget is less than what the smallest options take.
    """
    room = budget - sum(map(min, bits))
    if room < 0:
        raise ValueError(f"{budget} bits are less than the options take at least")
    step = max(1, -(-room // STEPS))
    width = room // step + 1
    best, chosen = np.zeros(width), list[np.ndarray]()
    extra = [[-(-(b - min(row)) // step) for b in row] for row in bits]
    for cost, loss in zip(extra, losses, strict=True):
        found, number = np.full(width, np.inf), np.zeros(width, np.int8)
        for option in sorted(range(len(cost)), key=lambda o: (cost[o], o)):
            if cost[option] < width:
                total = np.full(width, np.inf)
                total[cost[option] :] = best[: width - cost[option]] + loss[option]
                number[total < found] = option
                found = np.minimum(found, total)
        best = found
        chosen.append(number)
    left, taken = width - 1, list[int]()
    for cost, number in zip(reversed(extra), reversed(chosen), strict=True):
        taken.append(int(number[left]))
        left -= cost[taken[-1]]
    return taken[::-1]
