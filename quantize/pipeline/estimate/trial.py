"""A trial runs the first blocks of a run on some of the data, without writing anything."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from quantize.calibration.probes import verification_inputs
from quantize.calibration.runner import SequentialRunner
from quantize.graph.interpreter import Overrides
from quantize.graph.program import Segment
from quantize.nn.prefix_tokens import PrefixTokens
from quantize.pipeline.context import RunContext, running
from quantize.pipeline.estimate.memory import MemoryEstimate
from quantize.pipeline.plan import Plan
from quantize.pipeline.prepare import Prepared
from quantize.pipeline.sequential import SequentialPipeline
from quantize.pipeline.steps.global_statistics import collect_global_statistics
from quantize.pipeline.steps.prefix_search import resolve_prefix


@dataclass(frozen=True)
class Trial:
    """The times, in s, of the first blocks on some calibration rows.

    Attributes:
        rows: the number of rows; 0 in a run that uses no data.
        passes: the time of the global statistics, which a run collects before its first block, here on these blocks
            alone.
        before: the time of all these blocks but the last.
        block: the time of the last block.
    """

    rows: int
    passes: float
    before: float
    block: float

    def seconds(self, blocks: float) -> float:
        """Return the time of a model of so many blocks like the last one, on these rows."""
        return self.before + (self.passes + self.block) * blocks


def run_trial(found: MemoryEstimate, segments: tuple[Segment, ...], rows: int) -> Trial:
    """Run the first blocks as a run does, on the first rows and with the same part of the steps of what is learned."""
    total, samples = len(found.samples.rows), replace(found.samples, rows=found.samples.rows[: rows or 1])
    plan = shortened(found.plan, (rows or total) / total)
    # The segments end with an empty one, because global statistics are collected on all segments but the last.
    program = replace(found.program, segments=(*segments, Segment("", (), ())))
    prepared = Prepared(found.checkpoint, program, plan, samples, 0.0, found.held_out)
    context = RunContext(plan.recipe.seed)
    start = time.perf_counter()
    with running("the model"):
        plan, _ = resolve_prefix(prepared, context)
        context = replace(context, prefix=PrefixTokens(plan.recipe.prefix_tokens))
        batches = context.prefix.batches(samples.batches(found.batch))
        surveys = collect_global_statistics(found.checkpoint, program, plan, batches, context)
        surveyed, seconds = time.perf_counter(), list[float]()
        prepared = replace(prepared, program=found.program, plan=plan)
        blocks = SequentialPipeline(prepared, context, surveys)
    with tempfile.TemporaryDirectory() as scratch:
        for number, segment in enumerate(segments):
            seconds.append(time.perf_counter())
            with running(segment.name):
                blocks.process(segment, blocks.read(segment), Path(scratch) / f"{number}.safetensors")
        end = time.perf_counter()
    return Trial(rows, surveyed - start, seconds[-1] - surveyed, end - seconds[-1])


def shortened(plan: Plan, part: float) -> Plan:
    """Return a plan in which passes, searches and tuning take this part of their steps, and at least one."""

    def fewer(steps: int) -> dict[str, int]:
        return {"steps": max(min(1, steps), round(steps * part))}

    steps = tuple(
        replace(step, handler=step.handler.model_copy(update=fewer(fields["steps"]))) if "steps" in fields else step
        for step, fields in ((step, step.handler.model_dump()) for step in plan.steps)
    )
    tune = plan.recipe.tune and plan.recipe.tune.model_copy(update=fewer(plan.recipe.tune.steps))
    return replace(plan, steps=steps, recipe=plan.recipe.model_copy(update={"tune": tune}))


def run_probes(found: MemoryEstimate, segments: tuple[Segment, ...]) -> None:
    """Read the first blocks and run them on the probes, as the verification does."""
    given = verification_inputs(found.samples, found.program.vocabulary, found.plan.recipe.seed)
    runner = SequentialRunner(found.program, PrefixTokens(found.plan.recipe.prefix_tokens).batches(given))
    for segment in segments:
        with running(segment.name):
            runner.run(segment.nodes, Overrides({n: found.checkpoint.float_tensor(n) for n in segment.parameters}))
