"""GPU kernels are timed in CUDA graphs, so that launches cost nothing, on operands that no cache holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
Timer = Callable[[Sequence[Call]], list[float]]
REPLAYS = 50
CALLS = 20  # in a graph, at least, so that the time of its own launch is small
BEYOND_CACHE = 2.0  # the rotating operands fill the L2 cache so many times


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call, over all replays of two runs; `spread` is the relative distance of their medians."""

    median: float
    p10: float
    p90: float
    spread: float


def summarize(first: Sequence[float], second: Sequence[float]) -> Timing:
    """Combine two runs' microseconds in one timing."""
    medians = [quantile(run, 0.5) for run in (first, second)]
    both = [*first, *second]
    spread = abs(medians[0] / medians[1] - 1)
    return Timing(quantile(both, 0.5), quantile(both, 0.1), quantile(both, 0.9), spread)


def quantile(times: Sequence[float], part: float) -> float:
    """Return the value below which this part of the times lies, interpolated between neighbours."""
    return float(torch.tensor(times, dtype=torch.float64).quantile(part))


def time_twice(timer: Timer, calls: Sequence[Call]) -> Timing:
    """Time calls in two runs, one after the other."""
    return summarize(timer(calls), timer(calls))


def copies(operand_bytes: float, cache_bytes: int) -> int:
    """Return how many sets of operands, at least three, are together too large for the cache if used in turn."""
    return max(3, int(BEYOND_CACHE * cache_bytes / operand_bytes) + 1)


def time_graph(calls: Sequence[Call]) -> list[float]:
    """Return microseconds of one call, for each of 50 replays of a CUDA graph with the calls in turn."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compiles kernels and sets up libraries before the graph
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph, turns = torch.cuda.CUDAGraph(), -(-CALLS // len(calls))
    with torch.cuda.graph(graph, stream=stream):
        kept = [call() for _ in range(turns) for call in calls]
    times = [replay(graph) / len(kept) for _ in range(REPLAYS + 3)]
    return times[3:]


def replay(graph: torch.cuda.CUDAGraph) -> float:
    """Return the microseconds of one replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3
