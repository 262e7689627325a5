"""The time of a run is estimated from its first block, which runs on a part of the data.

The time grows with the calibration rows, with the steps of what is learned, or with neither. So the block runs on a
part of the rows and steps, then on twice that part, and so on; the line through the last two times is followed to the
whole.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

from rich.console import Console

from quantize.checkpoint.weight_checks import check_weights
from quantize.graph.program import Segment
from quantize.pipeline.estimate.memory import MemoryEstimate
from quantize.pipeline.estimate.trial import Trial, run_probes, run_trial
from quantize.pipeline.fold_check import checks_folds

BUDGET = 30.0  # s to measure in; two parts of the data run even if they take longer


@dataclass(frozen=True)
class TimeEstimate:
    """The measured times from which the time of a run follows.

    Attributes:
        name: the name of the block that ran.
        rows: the calibration rows of the run; 0 if it uses none.
        blocks: the size of the model in such blocks, by their quantized weights.
        once: s for what does not depend on the rows: to open, export, check and verify the model.
        trials: the trials, each on more rows than the one before.
    """

    name: str
    rows: int
    blocks: float
    once: float
    trials: tuple[Trial, ...]

    @property
    def seconds(self) -> float:
        """The time of the whole run, in s."""
        before, last = (trial.seconds(self.blocks) for trial in (self.trials[-2:] * 2)[-2:])
        more = self.rows - self.trials[-1].rows
        slope = max(0.0, last - before) / (self.trials[-1].rows - self.trials[-2].rows) if more else 0.0
        return self.once + last + slope * more

    def __str__(self) -> str:
        last = self.trials[-1]
        on = f" on {last.rows} of {self.rows} rows" if self.rows else ""
        return f"about {rounded(self.seconds)}; ran {self.name}{on} in {last.block:.1f} s"


def measure_time(found: MemoryEstimate, opened: float, console: Console | None = None) -> TimeEstimate:
    """Run the first block of a run for about `BUDGET` seconds.

    Args:
        found: the estimate of the run.
        opened: the time that opening and exporting the model took, in s.
        console: the console that says that this takes a while.

    Raises:
        QuantizeError: a weight of these blocks is missing, of the wrong shape or not finite, or they do not run.
    """
    number, total = first_block(found), len(found.samples.rows) if found.plan.calibrates else 0
    segments = found.program.segments[: number + 1]
    if console is not None:
        what = f"measuring the time: running {segments[-1].name} on part of the calibration data"
        console.print(f"{what}, for half a minute at most", soft_wrap=True)
    start = time.perf_counter()
    parameters = {name: found.parameters[name] for segment in segments for name in segment.parameters}
    check_weights(found.checkpoint, {name: x.shape for name, x in parameters.items()})
    run_probes(found, segments)
    read = time.perf_counter() - start
    trials = [run_trial(found, segments, min(found.batch, total))]
    while (done := trials[-1].rows) < total:
        spent = time.perf_counter() - start
        if len(trials) > 1 and spent + 2 * trials[-1].seconds(1) > BUDGET:
            break
        trials.append(run_trial(found, segments, min(2 * done, total)))
    whole = sum(x.numel() for x in found.parameters.values()) / sum(x.numel() for x in parameters.values())
    blocks = sum(quantized(found, s) for s in found.program.segments) / quantized(found, segments[-1])
    runs = 1 + checks_folds(found.plan)  # the check of folds, and the verification
    return TimeEstimate(segments[-1].name, total, blocks, opened + read * whole * runs, tuple(trials))


def first_block(found: MemoryEstimate) -> int:
    """Return the number of the first block of the kind, by its linears, that holds most of the quantized weights."""
    kinds, weights = list[tuple[object, ...]](), Counter[tuple[object, ...]]()
    for segment in found.program.segments:
        linears = [linear for sharing in found.together(segment) for linear in sharing]
        kinds.append(tuple(found.parameters[linear.weight].shape for linear in linears))
        weights[kinds[-1]] += quantized(found, segment)
    return kinds.index(weights.most_common(1)[0][0])


def quantized(found: MemoryEstimate, segment: Segment) -> int:
    """Return the number of weights of a block that are quantized."""
    return sum(found.parameters[linear.weight].numel() for sharing in found.together(segment) for linear in sharing)


def rounded(seconds: float) -> str:
    """Return a time as one tells it: `8 s`, `40 s`, `6 minutes`, `2.5 hours`."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds < 10 else f"{5 * round(seconds / 5)} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"
