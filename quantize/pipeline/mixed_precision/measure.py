"""What each option of each unit loses is estimated on a few calibration rows.

Each unit is rounded alone (`rounded_alone`), and what that does to the values behind its block is weighed by the
gradient of the loss (`sensitivity`). Another option of the unit loses in the proportion of the errors of its linears'
outputs. All of these are squares of small errors, which add up if the errors are independent. Passes that need no data
are applied first.
"""

from __future__ import annotations

import zlib
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
from quantize.pipeline.held_out_runs import last_output, scored_length
from quantize.pipeline.memory import trim_heap
from quantize.pipeline.mixed_precision.rounded_alone import rounded_alone
from quantize.pipeline.mixed_precision.sensitivity import (
    Gradients,
    cost,
    deviation,
    first_gradients,
    gradients_behind,
    on_host,
)
from quantize.pipeline.prepare import Prepared
from quantize.pipeline.progress import track
from quantize.pipeline.rng import derived_generator
from quantize.pipeline.steps.transform import PassRunner

T = TypeVar("T")
ROWS = 4  # of calibration data, on which losses are measured
FIT = 24  # rows that the quantizer sees, or those same ones if there are too few


def measure(prepared: Prepared, units: Sequence[Unit], context: RunContext) -> list[list[float]]:
    """Return the loss of each option of each unit: KL(float ‖ rounded) in nats per token for a model with a vocabulary.

    For other models it is ‖y - y'‖² / ‖y'‖² of the output.
    """
    program, plan, console = prepared.program, without_data(prepared.plan), context.console
    judged, fit = split(prepared.samples.rows)
    short = HeldOutRows(judged, whole=prepared.samples.whole).batches(scored_length(program.vocabulary))
    uncut = replace(prepared.samples, rows=fit).batches(1)
    floats, seen = (SequentialRunner(program, context.prefix.batches(batches)) for batches in (short, uncut))
    passes = PassRunner(program, plan, context, SequentialRunner(program, []), SequentialRunner(program, []))
    numbers = {unit.linears[0]: number for number, unit in enumerate(units)}
    starts, deviations = list[list[Values]](), dict[int, list[Gradients]]()
    ratios, losses = dict[int, list[float]](), dict[int, float]()
    last = program.segments[-1]

    def read(segment: Segment) -> Block:
        return passes.apply(Block.read(prepared.checkpoint, program, segment, plan.schemes, context.device))

    for segment in track(program.segments, "weighing bits of", lambda s: s.name, console):
        block = read(segment)
        here = {numbers[x]: units[numbers[x]] for x in block.linears if x in numbers}
        alone = rounded_alone(block, here, plan.quantizer, floats, seen, context.prefix, finish=segment is not last)
        ratios |= {number: each.ratios for number, each in alone.items()}
        state, states = block.overrides(), {number: each.block.overrides() for number, each in alone.items()}
        if segment is last:
            losses, count = effects(program, segment, floats, state, states)
            draw = derived_generator(context.seed, zlib.crc32(b"weighing bits"))
            found = [first_gradients(program, segment, state, values, draw) for values in floats.values]
            break
        before = [dict(values) for values in floats.values]
        starts.append([on_host(values) for values in before])
        floats.run(segment.nodes, state)
        for number, own in states.items():
            runner = SequentialRunner.of(program, map(dict, before))
            runner.run(segment.nodes, own)
            deviations[number] = [deviation(*pair) for pair in zip(runner.values, floats.values, strict=True)]
        del block, alone, state, states, before  # freed before the next is read
        trim_heap()
    for segment, gradients in gradients_behind(program, found, starts, lambda s: read(s).overrides(), console):
        decided = [numbers[x] for x in program.linears(segment) if x in numbers]
        losses |= {n: sum(map(cost, deviations.pop(n), gradients)) / count for n in decided}
        if not deviations:
            break
    return [[losses[number] * ratio for ratio in ratios[number]] for number in range(len(units))]


def split(rows: Sequence[Row]) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Return rows on which losses are measured, and others on which the quantizer is fitted, both evenly spread."""
    taken = spread(range(len(rows)), ROWS + FIT)
    judged = spread(taken, ROWS)
    fit = [n for n in taken if n not in judged] or judged
    return tuple(rows[n] for n in judged), tuple(rows[n] for n in fit)


def effects(
    program: Program, segment: Segment, floats: SequentialRunner, reference: Overrides, states: Mapping[T, Overrides]
) -> tuple[dict[T, float], int]:
    """Return what the outputs lose if the last block runs with other states, and the number of tokens, or of rows."""
    totals, count = dict.fromkeys(states, 0.0), 0
    for values in floats.values:
        expected = last_output(program, segment, values, reference)
        has_logits = expected.dim() == 3 and expected.shape[-1] == program.vocabulary
        expected = expected.flatten(0, 1) if has_logits else expected
        count += len(expected) if has_logits else 1
        for name, state in states.items():
            y = last_output(program, segment, values, state)
            if has_logits:
                none = torch.zeros(len(expected), dtype=torch.long, device=y.device)
                totals[name] += divergence(y.flatten(0, 1), expected, none).kl
            else:
                totals[name] += float((y - expected).square().sum() / expected.square().sum())
    return {name: total / max(count, 1) for name, total in totals.items()}, max(count, 1)
