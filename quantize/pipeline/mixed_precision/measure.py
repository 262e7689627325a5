"""What each option of each unit loses is estimated on a few calibration rows.

A block is rounded plainly by itself in the float model, and what that does to the model's output is the block's loss.
It is shared out among the block's units by what each alone does to the block's output. An option of a unit then loses
in the proportion of the errors of its linears' outputs: by the recipe's quantizer with this option, over plain rounding
with the first. All of these are squares of small errors, which add up if the errors are independent. Passes that need
no data are applied first.

Plain rounding alone misleads. GPTQ leaves a fifth of its error to a linear behind a norm, whose inputs depend on each
other, and two thirds to one behind an activation function (SmolLM2-135M, 4 bits).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from quantize.calibration.data import Row, spread
from quantize.calibration.logits import divergence
from quantize.calibration.runner import SequentialRunner
from quantize.graph.interpreter import Overrides, Values
from quantize.graph.program import Program, Segment
from quantize.pipeline.bit_options import Unit
from quantize.pipeline.block import Block
from quantize.pipeline.context import RunContext
from quantize.pipeline.fold_check import without_data
from quantize.pipeline.held_out import HeldOutRows
from quantize.pipeline.held_out_runs import last_output, rounded_to_nearest, scored_length
from quantize.pipeline.memory import trim_heap
from quantize.pipeline.mixed_precision.option_errors import error_ratios
from quantize.pipeline.prepare import Prepared
from quantize.pipeline.progress import track
from quantize.pipeline.rotation_choice import relative_errors
from quantize.pipeline.run_figures import hidden_state
from quantize.pipeline.steps.transform import PassRunner

T = TypeVar("T")
ROWS = 4  # of calibration data, on which losses are measured
FIT = 24  # rows that the quantizer sees, or those same ones if there are too few


def measure(prepared: Prepared, units: Sequence[Unit], context: RunContext) -> list[list[float]]:
    """Return the loss of each option of each unit: KL(float ‖ rounded) in nats per token for a model with a vocabulary.

    For other models it is ‖y - y'‖² / ‖y'‖² of the output.
    """
    program, plan = prepared.program, without_data(prepared.plan)
    judged, fit = split(prepared.samples.rows)
    short = HeldOutRows(judged, whole=prepared.samples.whole).batches(scored_length(program.vocabulary))
    uncut = replace(prepared.samples, rows=fit).batches(1)
    floats, seen = (SequentialRunner(program, context.prefix.batches(batches)) for batches in (short, uncut))
    passes = PassRunner(program, plan, context, SequentialRunner(program, []), SequentialRunner(program, []))
    numbers = {unit.linears[0]: number for number, unit in enumerate(units)}
    apart, shares = dict[str, SequentialRunner](), dict[str, dict[int, float]]()
    ratios, losses = dict[int, list[float]](), dict[int, float]()
    for segment in track(program.segments, "weighing bits of", lambda s: s.name, context.console):
        given = Block.read(prepared.checkpoint, program, segment, plan.schemes, context.device)
        block = passes.apply(given)
        here = {numbers[x]: units[numbers[x]] for x in block.linears if x in numbers}
        rounded, state, last = rounded_to_nearest(block), block.overrides(), segment is program.segments[-1]
        ratios |= error_ratios(block, here, plan.quantizer, floats, seen, finish=not last)
        alone = {n: replace(rounded, quantized={x: rounded.quantized[x] for x in u.linears}) for n, u in here.items()}
        if last:
            whole_blocks = effects(program, segment, floats, state, {x: (runner, state) for x, runner in apart.items()})
            losses |= effects(program, segment, floats, state, {n: (floats, b.overrides()) for n, b in alone.items()})
            break
        before = [dict(values) for values in floats.values]
        for runner in (floats, *apart.values()):
            runner.run(segment.nodes, state)
        if here:
            apart[segment.name] = SequentialRunner.of(program, before)
            apart[segment.name].run(segment.nodes, rounded.overrides())
            shares[segment.name] = {n: share(program, segment, before, floats, b) for n, b in alone.items()}
        del given, block, rounded, alone  # freed before the next is read
        trim_heap()
    for name, found in shares.items():
        total = sum(found.values())
        losses |= {n: whole_blocks[name] * (part / total if total else 1 / len(found)) for n, part in found.items()}
    return [[losses[number] * ratio for ratio in ratios[number]] for number in range(len(units))]


def split(rows: Sequence[Row]) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Return rows on which losses are measured, and others on which the quantizer is fitted, both evenly spread."""
    taken = spread(range(len(rows)), ROWS + FIT)
    judged = spread(taken, ROWS)
    fit = [n for n in taken if n not in judged] or judged
    return tuple(rows[n] for n in judged), tuple(rows[n] for n in fit)


def share(
    program: Program, segment: Segment, before: Sequence[Values], floats: SequentialRunner, block: Block
) -> float:
    """Return the mean over tokens of ‖y - y'‖² / ‖y'‖² behind a block that is rounded in part; 0 without a y."""
    node = hidden_state(program, segment)
    if node is None:
        return 0.0
    runner = SequentialRunner.of(program, [dict(values) for values in before])
    runner.run(segment.nodes, block.overrides())
    pairs = zip(runner.values, floats.values, strict=True)
    return float(torch.cat([relative_errors(found[node], y[node]) for found, y in pairs]).mean())


def effects(
    program: Program,
    segment: Segment,
    floats: SequentialRunner,
    reference: Overrides,
    models: Mapping[T, tuple[SequentialRunner, Overrides]],
) -> dict[T, float]:
    """Return what the outputs of other models lose against the float model's, row by row, behind the last block."""
    totals, count = dict.fromkeys(models, 0.0), 0
    for number, values in enumerate(floats.values):
        expected = last_output(program, segment, values, reference)
        has_logits = expected.dim() == 3 and expected.shape[-1] == program.vocabulary
        expected = expected.flatten(0, 1) if has_logits else expected
        count += len(expected) if has_logits else 1
        for name, (runner, state) in models.items():
            y = last_output(program, segment, runner.values[number], state)
            if has_logits:
                none = torch.zeros(len(expected), dtype=torch.long, device=y.device)
                totals[name] += divergence(y.flatten(0, 1), expected, none).kl
            else:
                totals[name] += float((y - expected).square().sum() / expected.square().sum())
    return {name: total / max(count, 1) for name, total in totals.items()}
