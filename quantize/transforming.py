"""Apply the steps of a plan to one block, each through the gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, fx

from quantize import gate
from quantize.calibration.runner import Runner
from quantize.fold import Transform, fold
from quantize.graph.basis import Basis
from quantize.graph.execute import State, Values
from quantize.graph.linears import Linear
from quantize.graph.program import Program, Segment
from quantize.kernels.hadamard import hadamard_transform
from quantize.linear import HadamardTransform, OnlineHadamard
from quantize.plan import Step


@dataclass
class Transformer:
    """The steps of a plan on their way through the blocks.

    Attributes:
        program, steps: what to transform, and how.
        calibration: batches to collect statistics on.
        probes: two other inputs that the gate compares.
        seed: of the private generators.
        sites: for each step the transforms made so far; one that spans blocks is made on the first and kept.
        differences: for each pass the largest difference that the gate saw in each block.
    """

    program: Program
    steps: Sequence[Step]
    calibration: Runner
    probes: Runner
    seed: int
    sites: list[dict[Basis, Transform]] = field(default_factory=list)
    differences: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sites = [{} for _ in self.steps]

    def apply(
        self, segment: Segment, weights: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, OnlineHadamard]]:
        """All steps on one block: its parameters afterwards, and what runs in front of its linears."""
        online: dict[str, OnlineHadamard] = {}
        for number, step in enumerate(self.steps):
            weights, online = self._apply_one(number, step, segment, weights, online)
        return weights, online

    def _apply_one(
        self, number: int, step: Step, segment: Segment, weights: dict[str, Tensor], online: dict[str, OnlineHadamard]
    ) -> tuple[dict[str, Tensor], dict[str, OnlineHadamard]]:
        linears = self.program.linears(segment)
        before = float_state(weights, linears, online)
        touched = self._make_transforms(number, step, segment, before)
        after = dict(weights)
        for basis in touched:
            after |= fold(basis, self.sites[number][basis], after)
        added = {
            linear.path: step.online[linear.path]
            for linear in linears
            if linear.path in step.online and linear.path not in online
        }
        after |= rotated_columns(after, linears, added)
        if touched or added:
            self._check(number, step, segment, before, float_state(after, linears, online | added), touched)
        return after, online | added

    def _make_transforms(self, number: int, step: Step, segment: Segment, state: State) -> list[Basis]:
        """The sites that this block touches, with their transforms made."""
        touched = [b for b in step.sites if any(e.parameter in state.weights for e in (*b.writers, *b.readers))]
        fresh = [b for b in touched if b not in self.sites[number]]
        statistics = {}
        if step.handler.needs is not None and fresh:
            ahead = Runner.of(self.program, (self._undo(values, number) for values in self.calibration.values))
            statistics = ahead.preview(segment, state, self.program.linears(segment), step.handler.needs)
        for basis in fresh:
            state_of = np.random.SeedSequence([self.seed, number, basis.index]).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(state_of[0] >> np.uint64(1)))
            self.sites[number][basis] = step.handler.transform(basis, statistics, state.weights, generator)
        return touched

    def _undo(self, values: Values, number: int) -> Values:
        """Values in front of a block, which all steps have transformed, as they were before step `number`."""
        for step, sites in reversed(list(zip(self.steps, self.sites, strict=True))[number:]):
            values = gate.in_coordinates(values, step.bases, sites, undo=True)
        return values

    def _check(
        self, number: int, step: Step, segment: Segment, before: State, after: State, touched: Sequence[Basis]
    ) -> None:
        """Hold the step up to the gate, and find the basis at fault where it fails."""
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


def rotated_columns(
    weights: Mapping[str, Tensor], linears: Sequence[Linear], online: Mapping[str, OnlineHadamard]
) -> dict[str, Tensor]:
    """The weights that read transformed inputs: W T⁻ᵀ = W T for T orthogonal."""
    return {
        linear.weight: linear.oriented(
            hadamard_transform(linear.oriented(weights[linear.weight]).double(), site.size, site.stride).float()
        )
        for linear in linears
        if (site := online.get(linear.path))
    }


def float_state(weights: dict[str, Tensor], linears: Sequence[Linear], online: Mapping[str, OnlineHadamard]) -> State:
    """A block in floating point, with the online transforms in front of its linears."""
    runs: dict[fx.Node, FloatLinear] = {}
    for linear in linears:
        if linear.path in online:
            weight, bias = linear.oriented(weights[linear.weight]), weights.get(linear.bias or "")
            runs[linear.node] = FloatLinear(HadamardTransform(online[linear.path]), weight, bias)
    return State(weights, dict(runs))


@dataclass(frozen=True)
class FloatLinear:
    """A linear in floating point behind an online transform."""

    transform: HadamardTransform
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        return torch.nn.functional.linear(self.transform(x), self.weight, self.bias)
