"""How long a run will take: its work (`work.py`), of the calibration activations, of the weights, and of each block."""

from __future__ import annotations

from collections.abc import Iterator

from quantize.calibration.gram_sums import BLOCK
from quantize.formats import get_format
from quantize.graph.linears import Linear
from quantize.graph.program import Segment
from quantize.pipeline.estimate.activation_work import NODE, batched, calibration, looked_at, quantized, rounded, rows
from quantize.pipeline.estimate.memory import MemoryEstimate
from quantize.pipeline.estimate.work import Work, passes
from quantize.quantizers.gptq import GPTQ

STORED = 8  # passes over each weight: read, searched for NaN, packed, hashed, written, read back and compared
FOLDED = 10  # passes over each weight that a pass takes, which transforms it in float64
ONCE = 50  # passes that rounding numbers to a grid takes, in a core's cache
TRIED = 18  # the same for each range that is tried, of which most groups are left before the last
SEARCH = 60  # operators for each range that is tried
COLUMN = 10  # operators for each column that GPTQ rounds
COPIED = 7  # passes over weights that GPTQ rounds: put in order, and back
TURN = 4  # passes for each time that it goes through the columns
IN_TURN = 45  # the same in a core's cache
SOLVE = 1.3  # a factorization runs at three quarters of the speed of a product
PROBED = 64  # tokens of the probes
BACKWARD = 3  # forward and backward cost three times the forward pass
QR = 7  # multiply-adds, in n³, of a QR decomposition and its gradient
FILES = 110  # of a block, its journal's among them, that are hashed and written through to the disk
LEARNING_TOKENS = 512


def count(found: MemoryEstimate) -> Work:
    """All that a run computes."""
    return sum(parts(found), Work())


def parts(found: MemoryEstimate) -> Iterator[Work]:
    """Calibration, its sums, transforms, rounding, and what each block takes beside that."""
    forward = calibration(found)
    yield forward.times(runs(found))
    for segment in found.program.segments:
        yield block(found, segment)
        for group in found.together(segment):
            yield group_work(found, group)
    yield sum((learning(found, step.sites[0].dim) for step in found.plan.steps if step.surveyed), Work())
    if tune := found.plan.recipe.tune:
        yield forward.times(BACKWARD * tune.steps / max(1, sum(found.batches.values())))


def runs(found: MemoryEstimate) -> int:
    """How often the calibration data goes through the model: as itself, for statistics, surveys and the prefix."""
    plan = found.plan
    looking = [step.handler.needs is not None for step in plan.steps]
    surveys = sum(1 + sum(looking[:i]) for i, step in enumerate(plan.steps) if step.surveyed)
    searched = plan.recipe.prefix is not None and plan.recipe.prefix.search
    return found.runners + sum(looking) + surveys + searched + (plan.recipe.tune is not None)


def block(found: MemoryEstimate, segment: Segment) -> Work:
    """Each weight read, transformed, written and read back; and the probes, before and after each pass as well."""
    weights, steps = [found.parameters[name].numel() for name in segment.parameters], len(found.plan.steps)
    forwards = 2 * (2 + 2 * steps)
    changed = sum((passes((STORED + FOLDED * steps) * n, n) for n in weights), Work())
    return changed + Work(PROBED * sum(weights) * (3 + 2 * steps), 0, NODE * len(segment.nodes) * forwards, FILES)


def group_work(found: MemoryEstimate, linears: list[Linear]) -> Work:
    """Linears that share an input: the sums over it, their rounding, and the input's."""
    N, K = [found.modules[x.path].out_features for x in linears], linears[0].columns
    work = sum((rounding(found, n, K) for n in N), Work()) + quantized(found, N, K) + looked_at(found, K)
    if not found.plan.quantizer.needs_gram:
        return work
    exact = found.plan.quantizer.needs_float_reference
    calls = COLUMN * K * (1 + getattr(found.plan.quantizer, "sweeps", 0))
    sums = (0.5 + 0.5 * min(1, BLOCK / K) + exact) * rows(found) * K * K
    work += Work(sums=sums) if found.in_bfloat16 else Work(sums)
    return work + Work(SOLVE * K**3 / 6, 0, calls) + batched(found, K, 2 + 2 * exact) + passes(8 * K * K, K * K)


def rounding(found: MemoryEstimate, N: int, K: int) -> Work:
    """One weight [N, K] to its grid, but for what those that share its input have in common."""
    quantizer, args = found.plan.quantizer, found.plan.recipe.weights
    tries = len(get_format(args.format).scale_search)
    tried = TRIED * tries if quantizer.mse else 0.0
    work = Work(cached=(ONCE + tried) * N * K, operators=SEARCH * tries * quantizer.mse)
    if not isinstance(quantizer, GPTQ):
        return work
    turns = 1 + quantizer.sweeps
    work += Work(N * K * K * 2 * quantizer.needs_float_reference) + passes((COPIED + TURN * turns) * N * K, N * K)
    return work + Work(cached=IN_TURN * turns * N * K) + rounded(found, N * K * K * (0.5 + quantizer.sweeps))


def learning(found: MemoryEstimate, dim: int) -> Work:
    """A rotation [dim, dim] learned from activations."""
    steps = max(getattr(step.handler, "steps", 0) for step in found.plan.steps)
    numbers = passes(steps * LEARNING_TOKENS * dim * 30, LEARNING_TOKENS * dim)
    return numbers + Work(steps * (BACKWARD * LEARNING_TOKENS * dim**2 + QR * dim**3), 0, steps * 200)
