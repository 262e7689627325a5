"""Passes that need no data are checked on the whole float model before calibration, which takes most of the time.

The same walk finds where rotations do harm.
"""

from __future__ import annotations

from dataclasses import replace

from quantize.calibration.probes import verification_inputs
from quantize.calibration.runner import SequentialRunner
from quantize.pipeline.block import Block
from quantize.pipeline.context import RunContext
from quantize.pipeline.memory import trim_heap
from quantize.pipeline.plan import LeftOut, Plan, made_anew
from quantize.pipeline.prepare import Prepared
from quantize.pipeline.progress import track
from quantize.pipeline.resume.journal import ROTATIONS
from quantize.pipeline.rotation_choice import RotationChoice
from quantize.pipeline.steps.stream_experts import streamed
from quantize.pipeline.steps.transform import PassRunner


def without_data(plan: Plan) -> Plan:
    """Return a plan whose passes that need data do nothing."""
    steps = (s if s.handler.needs is None else replace(s, sites=(), online=()) for s in plan.steps)
    return replace(plan, steps=tuple(steps))


def checks_folds(plan: Plan) -> bool:
    """Return whether there is something to check before calibration."""
    steps = without_data(plan).steps
    return any((plan.calibrates or step.judged) and (step.sites or step.online) for step in steps)


def resolve_rotations(prepared: Prepared, context: RunContext) -> Plan:
    """Check folds, and return the plan without the rotations that do harm, and say so.

    Raises:
        QuantizeError: as `check_folds`.
    """
    plan = prepared.plan

    def find() -> tuple[list[tuple[str, int, int]], list[str]]:
        found = check_folds(prepared, context)
        return sorted(found.bases), sorted(found.linears)

    bases, linears = context.cached(ROTATIONS, find)
    left_out = LeftOut(frozenset(bases), frozenset(linears))
    if left_out == plan.left_out:
        return plan
    if context.console is not None:
        context.console.print(describe(left_out), soft_wrap=True, markup=False)
    return made_anew(plan, prepared.program, plan.given, left_out)


def describe(left_out: LeftOut) -> str:
    """Say which rotations are left out."""
    what = [f"in front of {len(left_out.linears)} linears"] if left_out.linears else []
    what += [f"of {len(left_out.bases)} bases"] if left_out.bases else []
    return f"rotations {' and '.join(what)} are left out, as plain rounding loses less without them"


def check_folds(prepared: Prepared, context: RunContext) -> LeftOut:
    """Run the equivalence check on each pass that needs no data, block by block, on the float model.

    Weights that are not finite are found here as well.

    Returns:
        The rotations without which plain rounding loses clearly less.

    Raises:
        QuantizeError: a pass changes the function of a block, or a weight is wrong.
    """
    program, plan = prepared.program, without_data(prepared.plan)
    if not checks_folds(plan):
        return LeftOut()
    inputs = verification_inputs(prepared.samples, program.vocabulary, context.seed)
    probes, plain = (SequentialRunner(program, context.prefix.batches(inputs)) for _ in range(2))
    choice = RotationChoice(program, plan, context.prefix) if any(step.judged for step in plan.steps) else None
    passes = PassRunner(program, plan, context, SequentialRunner(program, []), probes)
    for segment in track(program.segments, "checking folds of", lambda s: s.name, context.console):
        large = streamed(prepared.checkpoint, program, segment, prepared.plan)
        given = Block.read(prepared.checkpoint, program, segment, plan.schemes, context.device, large)
        block = passes.apply(given)
        if choice is not None:
            choice.compare(given, block, plain, probes)
            plain.run(segment.nodes, given.overrides())
        probes.run(segment.nodes, block.overrides())
        del given, block  # freed before the next is read
        trim_heap()
    return LeftOut() if choice is None else choice.left_out()
