"""Statistics of a whole model before its first block is quantized, for bases that run through all of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from quantize.calibration.data import Row
from quantize.calibration.runner import Runner
from quantize.calibration.statistics import Statistic
from quantize.checkpoint import Checkpoint
from quantize.graph.program import Program
from quantize.leading import Leading
from quantize.plan import Plan
from quantize.progress import track
from quantize.ranks import Ranks, merged
from quantize.transforming import Transformer, behind, float_state


def survey(
    checkpoint: Checkpoint,
    program: Program,
    plan: Plan,
    batches: Sequence[Row],
    ranks: Ranks,
    console: Console | None = None,
    scratch: Path | None = None,
) -> dict[int, dict[str, Statistic]]:
    """For each step that asks for it: statistics of linear inputs by weight, as they are in front of that step.

    The float model runs once more for each such step, block by block, with the steps before it applied.
    """
    found: dict[int, dict[str, Statistic]] = {}
    for number, step in enumerate(plan.steps):
        if step.surveyed:
            calibration, steps = Runner(program, batches, scratch), plan.steps[:number]
            scheme, seed, leading = plan.recipe.linear_scheme, plan.recipe.seed, Leading(plan.recipe.prefix_tokens)
            transformer = Transformer(
                program, steps, scheme, calibration, Runner(program, []), seed, found, leading, ranks
            )
            found[number] = one_run(checkpoint, transformer, step.surveyed, step.handler.needs, console)
    return found


def one_run(
    checkpoint: Checkpoint,
    transformer: Transformer,
    weights: frozenset[str],
    make: type[Statistic] | None,
    console: Console | None,
) -> dict[str, Statistic]:
    """Statistics of the inputs of some linears in one run of the float model."""
    assert make is not None
    found: dict[str, Statistic] = {}
    program, calibration = transformer.program, transformer.calibration
    for segment in track(program.segments, "surveying", lambda s: s.name, console):
        held, fronts = transformer.apply(segment, {n: checkpoint.tensor(n).float() for n in segment.parameters})
        linears, transforms = program.linears(segment), behind(fronts, transformer.leading)
        targets = [linear for linear in linears if linear.weight in weights]
        state, finish = float_state(held, linears, fronts), segment is not program.segments[-1]
        for group in calibration.stops(segment, state, targets, finish):
            for linear in group:
                found[linear.weight] = make()
                for values in calibration.values:
                    found[linear.weight].update(transforms[linear.path](values[linear.source]))
    return merged(found, make, transformer.ranks)
