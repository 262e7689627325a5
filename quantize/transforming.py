"""Apply the steps of a plan to one block, each through the gate."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from quantize import gate
from quantize.calibration.runner import Runner
from quantize.calibration.statistics import Statistic
from quantize.fold import Transform, fold
from quantize.graph.basis import Basis
from quantize.graph.execute import State, Values
from quantize.graph.linears import Linear
from quantize.graph.program import Program, Segment
from quantize.leading import Leading
from quantize.online import Front
from quantize.passes.base import Place, Site
from quantize.plan import Step
from quantize.ranks import Ranks, merged
from quantize.scheme import Scheme
from quantize.seeding import private_generator

Fronts = Mapping[str, Front]
Surveys = Mapping[int, Mapping[str, Statistic]]


@dataclass
class Transformer:
    """The steps of a plan on their way through the blocks.

    Attributes:
        program, steps: what to transform, and how.
        scheme: what the linears are quantized to.
        calibration: batches to collect statistics on.
        probes: two other inputs that the gate compares.
        seed: of the private generators.
        surveys: for steps that need it, statistics of the whole float model (`survey`).
        leading: the tokens in front of each sequence, which statistics leave out.
        ranks: whose batches the statistics are of.
        sites: for each step the transforms made so far; one that spans blocks is made on the first and kept.
        differences: for each pass the largest difference that the gate saw in each block.
        changed: for each pass the linears that it put something in front of.
    """

    program: Program
    steps: Sequence[Step]
    scheme: Scheme
    calibration: Runner
    probes: Runner
    seed: int
    surveys: Surveys = field(default_factory=dict)
    leading: Leading = field(default_factory=Leading)
    ranks: Ranks = field(default_factory=Ranks)
    sites: list[dict[Basis, Transform]] = field(default_factory=list)
    differences: dict[str, dict[str, float]] = field(default_factory=dict)
    changed: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sites = [{} for _ in self.steps]

    def apply(self, segment: Segment, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Front]]:
        """All steps on one block: its parameters afterwards, and what is in front of its linears, by path."""
        plain = Front(activations=self.scheme.activations)
        fronts = {linear.path: plain for linear in self.program.linears(segment)}
        for number in range(len(self.steps)):
            weights, fronts = self._apply_one(number, segment, weights, fronts)
        return weights, fronts

    def _apply_one(
        self, number: int, segment: Segment, weights: dict[str, Tensor], fronts: dict[str, Front]
    ) -> tuple[dict[str, Tensor], dict[str, Front]]:
        step, linears = self.steps[number], self.program.linears(segment)
        before = float_state(weights, linears, fronts)
        touched = [b for b in step.sites if any(e.parameter in weights for e in (*b.writers, *b.readers))]
        reached = [linear for linear in linears if linear.path in step.online]
        statistics = self._statistics(number, segment, before, fronts, touched, reached)
        after = dict(weights)
        for basis in touched:
            if basis not in self.sites[number]:
                site = Site(basis, statistics, weights, self.scheme, private_generator(self.seed, number, basis.index))
                self.sites[number][basis] = step.handler.transform(site)
            after |= fold(basis, self.sites[number][basis], after)
        changed = {x.path: self._front(number, x, after, fronts[x.path], statistics) for x in reached}
        changed = {path: front for path, front in changed.items() if front != fronts[path]}
        after |= absorbed(after, linears, fronts, changed)
        if changed:
            self.changed.setdefault(step.handler.name, []).extend(changed)
        if touched or any(front.online != fronts[path].online for path, front in changed.items()):
            self._check(number, segment, before, float_state(after, linears, fronts | changed), touched)
        return after, fronts | changed

    def _front(
        self, number: int, linear: Linear, weights: Mapping[str, Tensor], front: Front, statistics: Mapping[str, Any]
    ) -> Front:
        """What a step wants in front of one linear."""
        step = self.steps[number]
        generator = private_generator(self.seed, number, zlib.crc32(linear.source.name.encode()))
        W, basis = linear.oriented(weights[linear.weight]), step.bases.reading(linear.weight)
        statistic = statistics.get(linear.weight)
        return step.handler.front(Place(linear.path, basis, statistic, W, front, self.scheme, generator))

    def _statistics(
        self,
        number: int,
        segment: Segment,
        state: State,
        fronts: Fronts,
        touched: Sequence[Basis],
        reached: Sequence[Linear],
    ) -> dict[str, Statistic]:
        """What the pass needs to know of the inputs of this block's linears, and of those that were surveyed."""
        needs, found = self.steps[number].handler.needs, dict(self.surveys.get(number, {}))
        if needs is None or (not reached and all(basis in self.sites[number] for basis in touched)):
            return found
        ahead = Runner.of(self.program, (self._undo(values, number) for values in self.calibration.values))
        seen = ahead.preview(segment, state, self.program.linears(segment), needs, behind(fronts, self.leading))
        return found | merged(seen, needs, self.ranks)

    def _undo(self, values: Values, number: int) -> Values:
        """Values in front of a block, which all steps have transformed, as they were before step `number`."""
        for step, sites in reversed(list(zip(self.steps, self.sites, strict=True))[number:]):
            values = gate.in_coordinates(values, step.bases, sites, undo=True)
        return values

    def _check(self, number: int, segment: Segment, before: State, after: State, touched: Sequence[Basis]) -> None:
        """Hold the step up to the gate, and find the basis at fault where it fails."""
        step = self.steps[number]
        probes = [self._undo(values, number) for values in self.probes.values]
        sites = self.sites[number]
        found = gate.difference(self.program, segment, before, after, probes, step.bases, sites)
        self.differences.setdefault(step.handler.name, {})[segment.name] = found
        blame = {}
        if found > gate.TOLERANCE:
            for basis in touched:
                alone = State(before.weights | fold(basis, sites[basis], before.weights), before.linears)
                only = {basis: sites[basis]}
                blame[gate.describe(basis)] = gate.difference(
                    self.program, segment, before, alone, probes, step.bases, only
                )
        gate.require(step.handler.name, found, blame, segment)


def behind(fronts: Fronts, leading: Leading) -> dict[str, Callable[[Tensor], Tensor]]:
    """For each linear, by path, what its input has gone through when it meets the weight, without the prefix's rows."""
    return {path: lambda x, front=front: front.transform(leading.rest(x)) for path, front in fronts.items()}  # type: ignore[misc]


def absorbed(
    weights: Mapping[str, Tensor], linears: Sequence[Linear], fronts: Fronts, changed: Fronts
) -> dict[str, Tensor]:
    """The weights of the linears whose front has changed, with the transforms that came to it absorbed."""
    found = [(linear, changed[linear.path]) for linear in linears if linear.path in changed]
    return {
        linear.weight: linear.oriented(
            front.absorb(linear.oriented(weights[linear.weight]), done=len(fronts[linear.path].online))
        )
        for linear, front in found
    }


def float_state(weights: dict[str, Tensor], linears: Sequence[Linear], fronts: Fronts) -> State:
    """A block in floating point, with the online transforms in front of its linears."""
    runs: dict[fx.Node, FloatLinear] = {}
    for linear in linears:
        front = fronts.get(linear.path, Front())
        if front.online:
            weight, bias = linear.oriented(weights[linear.weight]), weights.get(linear.bias or "")
            runs[linear.node] = FloatLinear(front, weight, front.bias(weight, bias))
    return State(weights, dict(runs))


@dataclass(frozen=True)
class FloatLinear:
    """A linear in floating point behind its online transforms."""

    front: Front
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        return torch.nn.functional.linear(self.front.transform(x), self.weight, self.bias)
