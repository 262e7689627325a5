"""Weights on a grid are kept, or transformed and rounded anew: what loses less on rows held back is done.

Transforms gain more than exact weights where activations have few bits, and less where these have many.
"""

from __future__ import annotations

from dataclasses import replace

from quantize.calibration.probes import verification_inputs
from quantize.calibration.runner import SequentialRunner
from quantize.nn.prefix_tokens import PrefixTokens
from quantize.pipeline.block import Block
from quantize.pipeline.context import RunContext
from quantize.pipeline.fold_check import without_data
from quantize.pipeline.held_out_runs import HeldOutRuns
from quantize.pipeline.memory import trim_heap
from quantize.pipeline.plan import Plan
from quantize.pipeline.prepare import Prepared
from quantize.pipeline.progress import track
from quantize.pipeline.resume.journal import GRIDS
from quantize.pipeline.steps.transform import PassRunner
from quantize.quantizers.grid import on_grid
from quantize.quantizers.rtn import RoundToNearest


def choose_grids(prepared: Prepared, context: RunContext) -> Plan:
    """Return the plan that loses less on the rows held back, if there are two, and say so.

    Without such rows the plan stays as it is.

    Raises:
        QuantizeError: a pass changes the function of a block, or a weight is wrong.
    """
    plan, other = prepared.plan, prepared.plan.alternative
    if other is None or not prepared.held_out.rows or prepared.program.export_error:
        return plan
    kept, anew = (plan, other) if plan.kept else (other, plan)
    loss_kept, loss_anew = context.cached(GRIDS, lambda: measure(prepared, kept, anew, context))
    figures = f"({{:.4f}} and {{:.4f}} {'KL' if prepared.held_out.generates else 'off'} on rows held back)"
    if loss_kept <= loss_anew:
        note = f"{kept.note}, which loses less than the recipe's transforms {figures.format(loss_kept, loss_anew)}"
        return replace(kept, note=note, alternative=None)
    note = f"{anew.note} {figures.format(loss_anew, loss_kept)}"
    return replace(anew, note=note, alternative=None)


def measure(prepared: Prepared, kept: Plan, anew: Plan, context: RunContext) -> tuple[float, float]:
    """Return what keeping weights on grids loses, and what transforms and plain rounding lose, on the rows held back.

    Both are KL to the float model, nats per token, or the relative error of the output.
    """
    program = prepared.program
    inputs = verification_inputs(prepared.samples, program.vocabulary, context.seed)
    runs, context = HeldOutRuns(program, prepared.held_out, PrefixTokens()), replace(context, prefix=PrefixTokens())
    probes = [SequentialRunner(program, inputs) for _ in range(2)]
    plans = [without_data(plan) for plan in (kept, anew)]
    passes = [
        PassRunner(program, plan, context, SequentialRunner(program, []), probe)
        for plan, probe in zip(plans, probes, strict=True)
    ]
    for segment in track(program.segments, "comparing grids and transforms in", lambda s: s.name, context.console):
        states, blocks = [], list[Block]()
        for plan, runner, probe in zip(plans, passes, probes, strict=True):
            given = Block.read(prepared.checkpoint, program, segment, plan.schemes, context.device)
            block = runner.apply(given)
            probe.run(segment.nodes, block.overrides())
            states.append(rounded(block, plan).overrides())
            blocks.append(given)
        runs.run(segment, blocks[0].overrides(), *states)
        del states, blocks
        trim_heap()
    name = "kl" if "kl" in runs.scores["quantized"] else "error"
    return runs.scores["plain_rounding"][name], runs.scores["quantized"][name]


def rounded(block: Block, plan: Plan) -> Block:
    """Return a block whose linears are kept on their grids, as far as the plan says so, or rounded to nearest."""
    found = {}
    for linear, scheme in block.schemes.items():
        W, dtype = block.weight(linear), block.dtypes[linear.weight]
        own = on_grid(W, scheme.weights, dtype) if linear.path in plan.kept else None
        weight = own or RoundToNearest().quantize(W, scheme.weights, None, dtype)
        found[linear] = block.quantize(linear, weight, PrefixTokens())
    return replace(block, quantized=found)
