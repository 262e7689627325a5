"""What each option of each unit loses is estimated on a few calibration rows, with plain rounding.

A block is rounded by itself in the float model, and what that does to the model's output is the block's loss. It is
shared out among the block's units by what each alone does to the block's output, and a unit's other options are in the
proportion of the errors of its linears' outputs. All of these are squares of small errors, which add up if the errors
are independent. Passes that need no data are applied first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quantize.calibration.data import spread
from quantize.calibration.logits import divergence
from quantize.calibration.runner import SequentialRunner
from quantize.graph.interpreter import Overrides, Values
from quantize.graph.linears import Linear
from quantize.graph.program import Program, Segment
from quantize.pipeline.bit_options import Unit
from quantize.pipeline.block import Block
from quantize.pipeline.context import RunContext
from quantize.pipeline.fold_check import without_data
from quantize.pipeline.held_out import HeldOutRows
from quantize.pipeline.held_out_runs import last_output, rounded_to_nearest, scored_length
from quantize.pipeline.memory import trim_heap
from quantize.pipeline.prepare import Prepared
from quantize.pipeline.progress import track
from quantize.pipeline.rotation_choice import relative_errors
from quantize.pipeline.run_figures import hidden_state
from quantize.pipeline.steps.transform import PassRunner
from quantize.quantizers.rtn import RoundToNearest
from quantize.scheme.scheme import Scheme

ROWS = 4  # of calibration data


def measure(prepared: Prepared, units: Sequence[Unit], context: RunContext) -> list[list[float]]:
    """Return the loss of each option of each unit: KL(float ‖ rounded) in nats per token for a model with a vocabulary.

    For other models it is ‖y - y'‖² / ‖y'‖² of the output.
    """
    program, plan = prepared.program, without_data(prepared.plan)
    rows = HeldOutRows(tuple(spread(prepared.samples.rows, ROWS)), whole=prepared.samples.whole)
    floats = SequentialRunner(program, context.prefix.batches(rows.batches(scored_length(program.vocabulary))))
    passes = PassRunner(program, plan, context, SequentialRunner(program, []), SequentialRunner(program, []))
    numbers = {unit.linears[0]: number for number, unit in enumerate(units)}
    apart, shares = dict[str, SequentialRunner](), dict[str, dict[int, float]]()
    ratios, losses = dict[int, list[float]](), dict[int, float]()
    for segment in track(program.segments, "weighing bits of", lambda s: s.name, context.console):
        given = Block.read(prepared.checkpoint, program, segment, plan.schemes, context.device)
        block = passes.apply(given)
        here = {numbers[x]: units[numbers[x]] for x in block.linears if x in numbers}
        ratios |= {number: error_ratios(program, block, unit, floats) for number, unit in here.items()}
        rounded, state, last = rounded_to_nearest(block), block.overrides(), segment is program.segments[-1]
        alone = {n: replace(rounded, quantized={x: rounded.quantized[x] for x in u.linears}) for n, u in here.items()}
        if last:
            effects = {name: effect(program, segment, floats, runner, state, state) for name, runner in apart.items()}
            losses |= {n: effect(program, segment, floats, floats, state, b.overrides()) for n, b in alone.items()}
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
        whole = sum(found.values())
        losses |= {n: effects[name] * (part / whole if whole else 1 / len(found)) for n, part in found.items()}
    return [[losses[number] * ratio for ratio in ratios[number]] for number in range(len(units))]


def error_ratios(program: Program, block: Block, unit: Unit, runner: SequentialRunner) -> list[float]:
    """Return the error of each option of a unit over that of its first: of outputs, or of the weights of experts."""
    first, ahead, state = unit.linears[0], SequentialRunner.of(program, runner.values), block.overrides()
    for _ in ahead.advance_to_linears(block.segment, state, [first], finish=False):
        inputs = [] if first.experts is not None else list(ahead.inputs(block.segment, first, state))
    errors = [sum(linear_error(block, x, option.scheme, inputs) for x in unit.linears) for option in unit.options]
    return [error / errors[0] if errors[0] else 0.0 for error in errors]


def linear_error(block: Block, linear: Linear, scheme: Scheme, inputs: Sequence[Tensor]) -> float:
    """Return the mean over tokens of ‖Ŵ x̂ - W x‖² / ‖W x‖² by plain rounding; without inputs ‖Ŵ - W‖² / ‖W‖²."""
    W, transform = block.weight(linear), block.input_transforms[linear]
    W_hat = RoundToNearest().quantize(W, scheme.weights, None, block.dtypes[linear.weight]).dequantize()
    if not inputs:
        return float((W_hat - W).square().sum() / W.square().sum().clamp(min=1e-30))
    transform = replace(transform, activations=scheme.activations)
    pairs = ((transform.quantized(x) @ W_hat.T, transform.rotate(x) @ W.T) for x in inputs)
    return float(torch.cat([relative_errors(*pair) for pair in pairs]).mean())


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


def effect(
    program: Program,
    segment: Segment,
    floats: SequentialRunner,
    runner: SequentialRunner,
    reference: Overrides,
    state: Overrides,
) -> float:
    """Return what another model's output loses against the float model's, row by row, behind the last block."""
    total, count = 0.0, 0
    for values, others in zip(floats.values, runner.values, strict=True):
        expected = last_output(program, segment, values, reference)
        y = last_output(program, segment, others, state)
        if y.dim() == 3 and y.shape[-1] == program.vocabulary:
            expected, y = expected.flatten(0, 1), y.flatten(0, 1)
            found = divergence(y, expected, torch.zeros(len(y), dtype=torch.long, device=y.device))
            total, count = total + found.kl, count + found.tokens
        else:
            total, count = total + float((y - expected).square().sum() / expected.square().sum()), count + 1
    return total / max(count, 1)
