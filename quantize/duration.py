"""How long a run will take: what it computes, counted, at the rates that were measured of this machine.

Three things are counted: multiply-adds of matrix products, float32 numbers that are changed one by one, and calls of
operators. The rest (hashing, reading, writing) takes seconds for each gigabyte and is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from quantize.graph.linears import Linear
from quantize.machine import Machine
from quantize.preflight import Preflight
from quantize.quantizers.base import RANGES
from quantize.quantizers.gptq import GPTQ

PASSES = 8  # over all numbers of a matrix, that rounding it to a grid and comparing takes
NODE = 20  # operators that calling one costs when a program calls it
COLUMN = 10  # operators for each column that GPTQ rounds
WIDE = 2  # a product in float64 costs two in float32
BACKWARD = 3  # forward and backward cost three times the forward pass
QR = 10  # multiply-adds, in n³, of a QR decomposition and its gradient
LEARNING_TOKENS = 512


@dataclass(frozen=True)
class Work:
    """Counts of multiply-adds, numbers and operators."""

    products: float = 0.0
    elements: float = 0.0
    operators: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.products + other.products, self.elements + other.elements, self.operators + other.operators)

    def times(self, count: float) -> Self:
        """So often."""
        return type(self)(self.products * count, self.elements * count, self.operators * count)

    def seconds(self, machine: Machine) -> float:
        """At the rates of a machine."""
        return self.products / machine.products + self.elements / machine.elements + self.operators * machine.operator


def count(found: Preflight) -> Work:
    """All that a run computes."""
    return sum(parts(found), Work())


def parts(found: Preflight) -> Iterator[Work]:
    """Calibration, its sums, transforms, rounding, and verifying."""
    forward = calibration(found)
    yield forward.times(runs(found))
    yield gate(found)
    for segment in found.program.segments:
        linears = [x for x in found.program.linears(segment) if x.path in found.modules]
        inputs = {x.source: x.columns for x in linears}
        yield sums(found, list(inputs.values()))
        yield sum((rounding(found, x) for x in linears), Work())
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
        elements = sum(sum(sizes.storages(node).values()) / 4 for node in nodes)
        total += Work(products, elements, NODE * len(nodes)).times(number)
    return total


def gate(found: Preflight) -> Work:
    """Each weight folded in float64 by each pass, and read back at the end."""
    weights = sum(x.numel() for x in found.parameters.values())
    nodes = sum(len(segment.nodes) for segment in found.program.segments)
    return Work(0, PASSES * weights * (1 + len(found.plan.steps)), 2 * NODE * nodes * (2 + 2 * len(found.plan.steps)))


def sums(found: Preflight, columns: list[int]) -> Work:
    """Gram matrices of the inputs of a block."""
    rows = sum(number * sizes.rows for number, sizes, _ in found.alive)
    each = (1 + found.plan.quantizer.needs_exact) * found.plan.quantizer.needs_gram
    return Work(each * rows * sum(K * K for K in columns), rows * sum(columns), 0)


def rounding(found: Preflight, linear: Linear) -> Work:
    """One weight [N, K] to its grid."""
    N, K = found.modules[linear.path].out_features, linear.columns
    quantizer, args = found.plan.quantizer, found.plan.recipe.weights
    tried = len(RANGES[args.format]) if quantizer.mse else 1
    work = Work(0, PASSES * tried * N * K, PASSES * tried)
    if not isinstance(quantizer, GPTQ):
        return work
    rounds, block = 1 + quantizer.sweeps, min(K, quantizer.block_size)
    solve = WIDE * (K**3 + quantizer.needs_exact * (N * K * K + K**3))
    return work + Work(solve + rounds * N * K * K, rounds * N * K * 2 * block, rounds * K * COLUMN)


def learning(found: Preflight, dim: int) -> Work:
    """A rotation [dim, dim] learned from activations."""
    steps = max(getattr(step.handler, "steps", 0) for step in found.plan.steps)
    return Work(
        steps * (BACKWARD * LEARNING_TOKENS * dim**2 + QR * dim**3), steps * LEARNING_TOKENS * dim * 30, steps * 200
    )
