"""Statistics of a whole model before its first block is quantized, for bases that run through all of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from quantize.calibration.data import Row
from quantize.calibration.runner import SequentialRunner
from quantize.calibration.statistics import Statistic
from quantize.checkpoint.checkpoint import Checkpoint
from quantize.graph.program import Program
from quantize.nn.prefix_tokens import PrefixTokens
from quantize.pipeline.distributed import SingleProcess, merged
from quantize.pipeline.plan import Plan
from quantize.pipeline.progress import track
from quantize.pipeline.steps.transform import PassRunner, float_state, input_hooks


def collect_global_statistics(
    checkpoint: Checkpoint,
    program: Program,
    plan: Plan,
    batches: Sequence[Row],
    ranks: SingleProcess,
    console: Console | None = None,
    scratch: Path | None = None,
) -> dict[int, dict[str, Statistic]]:
    """For each step that asks for it: statistics of linear inputs by weight, as they are in front of that step.

    The float model runs once more for each such step, block by block, with the steps before it applied.
    """
    found: dict[int, dict[str, Statistic]] = {}
    for number, step in enumerate(plan.steps):
        if step.surveyed:
            calibration, steps = SequentialRunner(program, batches, scratch), plan.steps[:number]
            scheme, seed, leading = plan.recipe.linear_scheme, plan.recipe.seed, PrefixTokens(plan.recipe.prefix_tokens)
            pass_runner = PassRunner(
                program, steps, scheme, calibration, SequentialRunner(program, []), seed, found, leading, ranks
            )
            found[number] = one_run(checkpoint, pass_runner, step.surveyed, step.handler.needs, console)
    return found


def one_run(
    checkpoint: Checkpoint,
    pass_runner: PassRunner,
    weights: frozenset[str],
    make: type[Statistic] | None,
    console: Console | None,
) -> dict[str, Statistic]:
    """Statistics of the inputs of some linears in one run of the float model."""
    assert make is not None
    found: dict[str, Statistic] = {}
    program, calibration = pass_runner.program, pass_runner.calibration
    for segment in track(program.segments, "surveying", lambda s: s.name, console):
        held, input_transforms = pass_runner.apply(
            segment, {n: checkpoint.tensor(n).float() for n in segment.parameters}
        )
        linears, transforms = program.linears(segment), input_hooks(input_transforms, pass_runner.leading)
        targets = [linear for linear in linears if linear.weight in weights]
        state, finish = float_state(held, linears, input_transforms), segment is not program.segments[-1]
        for group in calibration.advance_to_linears(segment, state, targets, finish):
            for linear in group:
                found[linear.weight] = make()
                for values in calibration.values:
                    found[linear.weight].update(transforms[linear.path](values[linear.source]))
    return merged(found, make, pass_runner.ranks)
