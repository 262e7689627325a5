"""Some bases run through the whole model; their statistics are collected before the first block is quantized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from quantize.calibration.data import Row
from quantize.calibration.runner import SequentialRunner
from quantize.calibration.statistics import Statistic
from quantize.checkpoint.checkpoint import Checkpoint
from quantize.graph.program import Program
from quantize.pipeline.block import Block
from quantize.pipeline.context import RunContext
from quantize.pipeline.distributed import merged
from quantize.pipeline.plan import Plan
from quantize.pipeline.progress import track
from quantize.pipeline.steps.stream_experts import streamed
from quantize.pipeline.steps.transform import PassRunner, Surveys, input_hooks


def collect_global_statistics(
    checkpoint: Checkpoint, program: Program, plan: Plan, batches: Sequence[Row], context: RunContext
) -> dict[int, dict[str, Statistic]]:
    """Return, for each step that asks for it, statistics of linear inputs by weight, as they are in front of that step.

    The float model runs once more for each such step, block by block, with the steps before it applied.
    """
    found: dict[int, dict[str, Statistic]] = {}
    for number, step in enumerate(plan.steps):
        if step.surveyed:
            found[number] = statistics_before(number, step.surveyed, checkpoint, program, plan, batches, context, found)
    return found


def statistics_before(
    number: int,
    weights: frozenset[str],
    checkpoint: Checkpoint,
    program: Program,
    plan: Plan,
    batches: Sequence[Row],
    context: RunContext,
    surveys: Surveys,
) -> dict[str, Statistic]:
    """Collect statistics of the inputs of some weights' linears, in front of step `number`, on the float model.

    Args:
        surveys: the statistics that were collected for the steps before.
    """
    make = plan.steps[number].handler.needs
    assert make is not None
    found: dict[str, Statistic] = {}
    before, calibration = replace(plan, steps=plan.steps[:number]), SequentialRunner(program, batches, context.scratch)
    pass_runner = PassRunner(program, before, context, calibration, SequentialRunner(program, []), surveys)
    for segment in track(program.segments, "surveying", lambda s: s.name, context.console):
        large = streamed(checkpoint, program, segment, plan)
        block = pass_runner.apply(Block.read(checkpoint, program, segment, plan.schemes, context.device, large))
        hooks, finish = input_hooks(block, context.prefix), segment is not program.segments[-1]
        targets = [linear for linear in block.linears if linear.weight in weights]
        for sharing in calibration.advance_to_linears(segment, block.overrides(), targets, finish):
            for linear in sharing:
                found[linear.weight] = make()
                for x in calibration.inputs(segment, linear, block.overrides()):
                    found[linear.weight].update(hooks[linear](x))
    return merged(found, make, context.ranks)
