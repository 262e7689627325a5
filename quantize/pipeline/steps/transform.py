"""Apply the steps of a plan to one block, each through the equivalence."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from quantize.calibration.runner import SequentialRunner
from quantize.calibration.statistics import Statistic
from quantize.graph.basis import Basis
from quantize.graph.interpreter import Overrides, Values
from quantize.graph.linears import Linear
from quantize.graph.program import Program, Segment
from quantize.nn.prefix_tokens import PrefixTokens
from quantize.passes.base import BasisContext, LinearContext
from quantize.pipeline.distributed import SingleProcess, merged
from quantize.pipeline.plan import Step
from quantize.pipeline.rng import derived_generator
from quantize.recipe.scheme import Scheme
from quantize.transforms import equivalence
from quantize.transforms.fold import Transform, fold
from quantize.transforms.online import InputTransform

InputTransforms = Mapping[str, InputTransform]
Surveys = Mapping[int, Mapping[str, Statistic]]


@dataclass
class PassRunner:
    """The steps of a plan on their way through the blocks.

    Attributes:
        program, steps: what to transform, and how.
        scheme: what the linears are quantized to.
        calibration: batches to collect statistics on.
        probes: two other inputs that the gate compares.
        seed: of the private generators.
        surveys: for steps that need it, statistics of the whole float model (`collect_global_statistics`).
        leading: the tokens in front of each sequence, which statistics leave out.
        ranks: whose batches the statistics are of.
        sites: for each step the transforms made so far; one that spans blocks is made on the first and kept.
        differences: for each pass the largest difference that the gate saw in each block.
        changed: for each pass the linears that it put something in front of.
    """

    program: Program
    steps: Sequence[Step]
    scheme: Scheme
    calibration: SequentialRunner
    probes: SequentialRunner
    seed: int
    surveys: Surveys = field(default_factory=dict)
    leading: PrefixTokens = field(default_factory=PrefixTokens)
    ranks: SingleProcess = field(default_factory=SingleProcess)
    sites: list[dict[Basis, Transform]] = field(default_factory=list)
    differences: dict[str, dict[str, float]] = field(default_factory=dict)
    changed: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sites = [{} for _ in self.steps]

    def apply(
        self, segment: Segment, weights: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, InputTransform]]:
        """All steps on one block: its parameters afterwards, and what is in front of its linears, by path."""
        plain = InputTransform(activations=self.scheme.activations)
        input_transforms = {linear.path: plain for linear in self.program.linears(segment)}
        for number in range(len(self.steps)):
            weights, input_transforms = self._apply_one(number, segment, weights, input_transforms)
        return weights, input_transforms

    def _apply_one(
        self, number: int, segment: Segment, weights: dict[str, Tensor], input_transforms: dict[str, InputTransform]
    ) -> tuple[dict[str, Tensor], dict[str, InputTransform]]:
        step, linears = self.steps[number], self.program.linears(segment)
        before = float_state(weights, linears, input_transforms)
        touched = [b for b in step.sites if any(e.parameter in weights for e in (*b.writers, *b.readers))]
        reached = [linear for linear in linears if linear.path in step.online]
        statistics = self._statistics(number, segment, before, input_transforms, touched, reached)
        after = dict(weights)
        for basis in touched:
            if basis not in self.sites[number]:
                context = BasisContext(
                    basis, statistics, weights, self.scheme, derived_generator(self.seed, number, basis.index)
                )
                self.sites[number][basis] = step.handler.transform(context)
            after |= fold(basis, self.sites[number][basis], after)
        changed = {
            x.path: self._input_transform(number, x, after, input_transforms[x.path], statistics) for x in reached
        }
        changed = {
            path: input_transform
            for path, input_transform in changed.items()
            if input_transform != input_transforms[path]
        }
        after |= fold_online(after, linears, input_transforms, changed)
        if changed:
            self.changed.setdefault(step.handler.name, []).extend(changed)
        if touched or any(
            input_transform.online != input_transforms[path].online for path, input_transform in changed.items()
        ):
            self._check(number, segment, before, float_state(after, linears, input_transforms | changed), touched)
        return after, input_transforms | changed

    def _input_transform(
        self,
        number: int,
        linear: Linear,
        weights: Mapping[str, Tensor],
        input_transform: InputTransform,
        statistics: Mapping[str, Any],
    ) -> InputTransform:
        """What a step wants in front of one linear."""
        step = self.steps[number]
        generator = derived_generator(self.seed, number, zlib.crc32(linear.source.name.encode()))
        W, basis = linear.as_out_in(weights[linear.weight]), step.bases.reading(linear.weight)
        statistic = statistics.get(linear.weight)
        return step.handler.input_transform(
            LinearContext(linear.path, basis, statistic, W, input_transform, self.scheme, generator)
        )

    def _statistics(
        self,
        number: int,
        segment: Segment,
        state: Overrides,
        input_transforms: InputTransforms,
        touched: Sequence[Basis],
        reached: Sequence[Linear],
    ) -> dict[str, Statistic]:
        """What the pass needs to know of the inputs of this block's linears, and of those that were surveyed."""
        needs, found = self.steps[number].handler.needs, dict(self.surveys.get(number, {}))
        if needs is None or (not reached and all(basis in self.sites[number] for basis in touched)):
            return found
        ahead = SequentialRunner.of(self.program, (self._invert(values, number) for values in self.calibration.values))
        seen = ahead.collect_without_advancing(
            segment, state, self.program.linears(segment), needs, input_hooks(input_transforms, self.leading)
        )
        return found | merged(seen, needs, self.ranks)

    def _invert(self, values: Values, number: int) -> Values:
        """Values in front of a block, which all steps have transformed, as they were before step `number`."""
        for step, sites in reversed(list(zip(self.steps, self.sites, strict=True))[number:]):
            values = equivalence.in_coordinates(values, step.bases, sites, invert=True)
        return values

    def _check(
        self, number: int, segment: Segment, before: Overrides, after: Overrides, touched: Sequence[Basis]
    ) -> None:
        """Hold the step up to the equivalence, and find the basis at fault where it fails."""
        step = self.steps[number]
        probes = [self._invert(values, number) for values in self.probes.values]
        sites = self.sites[number]
        found = equivalence.max_relative_difference(self.program, segment, before, after, probes, step.bases, sites)
        self.differences.setdefault(step.handler.name, {})[segment.name] = found
        blame = {}
        if found > equivalence.TOLERANCE:
            for basis in touched:
                alone = Overrides(before.weights | fold(basis, sites[basis], before.weights), before.linears)
                only = {basis: sites[basis]}
                blame[equivalence.describe_basis(basis)] = equivalence.max_relative_difference(
                    self.program, segment, before, alone, probes, step.bases, only
                )
        equivalence.require_equivalent(step.handler.name, found, blame, segment)


def input_hooks(input_transforms: InputTransforms, leading: PrefixTokens) -> dict[str, Callable[[Tensor], Tensor]]:
    """For each linear, by path, what its input has gone through when it meets the weight, without the prefix's rows."""
    return {
        path: lambda x, found=found: found.transform(leading.rest(x))  # type: ignore[misc]
        for path, found in input_transforms.items()
    }


def fold_online(
    weights: Mapping[str, Tensor],
    linears: Sequence[Linear],
    input_transforms: InputTransforms,
    changed: InputTransforms,
) -> dict[str, Tensor]:
    """The weights of the linears whose input_transform has changed, with the transforms that came to it absorbed."""
    found = [(linear, changed[linear.path]) for linear in linears if linear.path in changed]
    return {
        linear.weight: linear.as_out_in(
            input_transform.fold_into_weight(
                linear.as_out_in(weights[linear.weight]), done=len(input_transforms[linear.path].online)
            )
        )
        for linear, input_transform in found
    }


def float_state(weights: dict[str, Tensor], linears: Sequence[Linear], input_transforms: InputTransforms) -> Overrides:
    """A block in floating point, with the online transforms in front of its linears."""
    runs: dict[fx.Node, FloatLinear] = {}
    for linear in linears:
        input_transform = input_transforms.get(linear.path, InputTransform())
        if input_transform.online:
            weight, bias = linear.as_out_in(weights[linear.weight]), weights.get(linear.bias or "")
            runs[linear.node] = FloatLinear(input_transform, weight, input_transform.bias(weight, bias))
    return Overrides(weights, dict(runs))


@dataclass(frozen=True)
class FloatLinear:
    """A linear in floating point behind its online transforms."""

    input_transform: InputTransform
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        return torch.nn.functional.linear(self.input_transform.transform(x), self.weight, self.bias)
