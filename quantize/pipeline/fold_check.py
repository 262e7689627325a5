"""Passes that need no data are checked on the whole float model before calibration, which takes most of the time."""

from __future__ import annotations

from dataclasses import replace

from quantize.calibration.probes import verification_inputs
from quantize.calibration.runner import SequentialRunner
from quantize.pipeline.block import Block
from quantize.pipeline.context import RunContext
from quantize.pipeline.memory import trim_heap
from quantize.pipeline.plan import Plan
from quantize.pipeline.prepare import Prepared
from quantize.pipeline.progress import track
from quantize.pipeline.steps.transform import PassRunner


def without_data(plan: Plan) -> Plan:
    """Return a plan whose passes that need data do nothing."""
    steps = (s if s.handler.needs is None else replace(s, sites=(), online=()) for s in plan.steps)
    return replace(plan, steps=tuple(steps))


def checks_folds(plan: Plan) -> bool:
    """Return whether there is something to check before calibration."""
    return plan.calibrates and any(step.sites or step.online for step in without_data(plan).steps)


def check_folds(prepared: Prepared, context: RunContext) -> None:
    """Run the equivalence check on each pass that needs no data, block by block, on the float model.

    Weights that are not finite are found here as well.

    Raises:
        QuantizeError: a pass changes the function of a block, or a weight is wrong.
    """
    program, plan = prepared.program, without_data(prepared.plan)
    if not checks_folds(plan):
        return
    inputs = verification_inputs(prepared.samples, program.vocabulary, context.seed)
    probes = SequentialRunner(program, context.prefix.batches(inputs))
    passes = PassRunner(program, plan, context, SequentialRunner(program, []), probes)
    for segment in track(program.segments, "checking folds of", lambda s: s.name, context.console):
        block = passes.apply(Block.read(prepared.checkpoint, program, segment, plan.schemes, context.device))
        probes.run(segment.nodes, block.overrides())
        del block  # freed before the next is read
        trim_heap()
