"""How long a run will take: what it computes, counted, at the rates that were measured of this machine.

Counted are multiply-adds of matrix products (in float32, and as models that are stored in bfloat16 are calibrated),
float32 numbers that are changed one by one, calls of operators, and small files written through to the disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Self

from quantize.graph.linears import Linear
from quantize.graph.program import Segment
from quantize.machine import Machine
from quantize.preflight import Preflight
from quantize.quantizers.base import RANGES
from quantize.quantizers.gptq import GPTQ

STORED = 24  # passes over each weight: read, searched for NaN, packed, hashed, written, read back and compared
FOLDED = 24  # passes over each weight that a pass takes, which transforms it in float64
GRID = 6  # passes that rounding numbers to a grid takes
TRIED = 1.75  # the same where a grid is searched, in a core's cache
SEARCH = 24  # operators for each range that is tried
ROUNDED = 12  # passes over activations that are quantized
NODE = 20  # operators that calling one costs when a program calls it
COLUMN = 32  # operators for each column that GPTQ rounds
IN_TURN = 10  # passes over what is rounded column by column, in the cache
SOLVE = 2  # a factorization runs at half the speed of a product
PROBED = 64  # tokens of the probes
BACKWARD = 3  # forward and backward cost three times the forward pass
QR = 10  # multiply-adds, in n³, of a QR decomposition and its gradient
FILES = 80  # of a block, its journal's among them, that are hashed and written through to the disk
LEARNING_TOKENS = 512


@dataclass(frozen=True)
class Work:
    """Counts of multiply-adds, numbers, operators and files."""

    products: float = 0.0
    elements: float = 0.0
    operators: float = 0.0
    files: float = 0.0
    sums: float = 0.0
    rounded: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def times(self, count: float) -> Self:
        """So often."""
        return type(self)(*(getattr(self, f.name) * count for f in fields(self)))

    @property
    def multiply_adds(self) -> float:
        """Of all products."""
        return self.products + self.sums + self.rounded

    def seconds(self, machine: Machine) -> float:
        """At the rates of a machine."""
        products = self.products / machine.products + self.sums / machine.sums + self.rounded / machine.rounded
        rated = products + self.elements / machine.elements
        return rated + self.operators * machine.operator + self.files * machine.file


def count(found: Preflight) -> Work:
    """All that a run computes."""
    return sum(parts(found), Work())


def parts(found: Preflight) -> Iterator[Work]:
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


def runs(found: Preflight) -> int:
    """How often the calibration data goes through the model: as itself, for statistics, surveys and the prefix."""
    plan = found.plan
    looking = [step.handler.needs is not None for step in plan.steps]
    surveys = sum(1 + sum(looking[:i]) for i, step in enumerate(plan.steps) if step.surveyed)
    searched = plan.recipe.prefix is not None and plan.recipe.prefix.search
    return found.runners + sum(looking) + surveys + searched + (plan.recipe.tune is not None)


def calibration(found: Preflight) -> Work:
    """The calibration data once through the model."""
    total = Work()
    for number, sizes, _ in found.alive:
        nodes = [node for segment in found.program.segments for node in segment.nodes]
        products = sum(sizes.multiply_adds(node) for node in nodes)
        elements = sum(sizes.made(node) for node in nodes) / 4
        total += (rounded(found, products) + Work(0, elements, NODE * len(nodes))).times(number)
    return total


def rounded(found: Preflight, products: float) -> Work:
    """Products whose operands are rounded to bfloat16 where the model is calibrated in it."""
    return Work(rounded=products) if found.in_bfloat16 else Work(products)


def block(found: Preflight, segment: Segment) -> Work:
    """Each weight read, transformed, written and read back; and the probes, before and after each pass as well."""
    weights, steps = sum(found.parameters[name].numel() for name in segment.parameters), len(found.plan.steps)
    forwards = 2 * (2 + 2 * steps)
    return Work(
        PROBED * weights * (3 + 2 * steps),
        weights * (STORED + FOLDED * steps),
        NODE * len(segment.nodes) * forwards,
        FILES,
    )


def group_work(found: Preflight, linears: list[Linear]) -> Work:
    """Linears that share an input: the sums over it, their rounding, and the input's."""
    N, K = [found.modules[x.path].out_features for x in linears], linears[0].columns
    rows = sum(number * sizes.rows for number, sizes, _ in found.alive)
    work = sum((rounding(found, n, K) for n in N), Work()) + quantized(found, rows, sum(N), K)
    if not found.plan.quantizer.needs_gram:
        return work
    exact = found.plan.quantizer.needs_exact
    calls = COLUMN * K * (1 + getattr(found.plan.quantizer, "sweeps", 0))
    sums = (0.5 + exact) * rows * K * K
    work += Work(sums=sums) if found.in_bfloat16 else Work(sums)
    return work + Work(SOLVE * K**3 / 6, rows * K * (2 + 2 * exact) + 8 * K * K, calls)


def quantized(found: Preflight, rows: int, N: int, K: int) -> Work:
    """What quantized activations [rows, K] cost beside the product: their rounding, and adding up groups."""
    if found.plan.recipe.activations is None or not rows:
        return Work()
    groups = K // (found.plan.recipe.weights.group_size or K)
    return Work(0, rows * (ROUNDED * K * (1 + found.plan.quantizer.needs_exact) + GRID * N * groups), 0)


def rounding(found: Preflight, N: int, K: int) -> Work:
    """One weight [N, K] to its grid, but for what those that share its input have in common."""
    quantizer, args = found.plan.quantizer, found.plan.recipe.weights
    tried = TRIED * len(RANGES[args.format]) / 2 if quantizer.mse else 0.0  # most groups are left before it ends
    work = Work(0, (GRID + tried) * N * K, SEARCH * len(RANGES[args.format]) * quantizer.mse)
    if not isinstance(quantizer, GPTQ):
        return work
    work += Work(N * K * K * 2 * quantizer.needs_exact, N * K * (8 + IN_TURN * (1 + quantizer.sweeps)))
    return work + rounded(found, N * K * K * (0.5 + quantizer.sweeps))


def learning(found: Preflight, dim: int) -> Work:
    """A rotation [dim, dim] learned from activations."""
    steps = max(getattr(step.handler, "steps", 0) for step in found.plan.steps)
    return Work(
        steps * (BACKWARD * LEARNING_TOKENS * dim**2 + QR * dim**3), steps * LEARNING_TOKENS * dim * 30, steps * 200
    )
