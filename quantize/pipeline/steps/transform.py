"""The passes of a plan are applied to one block, and each goes through the equivalence check."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_aggregate

from quantize.calibration.runner import SequentialRunner
from quantize.calibration.statistics import Statistic
from quantize.errors import QuantizeError
from quantize.graph.basis import Basis
from quantize.graph.interpreter import Values
from quantize.graph.linears import Linear
from quantize.graph.program import Program
from quantize.nn.prefix_tokens import PrefixTokens
from quantize.passes.base import BasisContext, LinearContext
from quantize.pipeline.block import Block
from quantize.pipeline.context import RunContext
from quantize.pipeline.distributed import merged
from quantize.pipeline.held_out_runs import HeldOutRuns
from quantize.pipeline.plan import Plan
from quantize.pipeline.rng import derived_generator
from quantize.pipeline.run_figures import input_figures
from quantize.scheme.scheme import TABLE_SCHEME
from quantize.transforms import equivalence
from quantize.transforms.fold import Transform, fold
from quantize.transforms.online import InputTransform

Surveys = Mapping[int, Mapping[str, Statistic]]


@dataclass
class PassRunner:
    """Applies the passes of a plan to block after block.

    Attributes:
        program, plan: the program and the plan of the run.
        context: the context of the run.
        calibration: the batches on which statistics are collected.
        probes: two other inputs, on which the equivalence check compares.
        surveys: for steps that need them, statistics of the whole float model (`collect_global_statistics`).
        held_out: rows on which the inputs of linears are measured before and after each pass; None measures nothing.
        sites: for each step the transforms made so far; one that spans blocks is made on the first block and kept.
        differences: for each pass the largest difference that the check found in each block.
        changed: for each pass the linears in front of which it put something.
    """

    program: Program
    plan: Plan
    context: RunContext
    calibration: SequentialRunner
    probes: SequentialRunner
    surveys: Surveys = field(default_factory=dict)
    held_out: HeldOutRuns | None = None
    sites: list[dict[Basis, Transform]] = field(default_factory=list)
    differences: dict[str, dict[str, float]] = field(default_factory=dict)
    changed: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sites = [{} for _ in self.plan.steps]

    def apply(self, block: Block) -> Block:
        """Apply all passes to one block."""
        self._note_inputs(-1, block)
        for number in range(len(self.plan.steps)):
            before, block = block, self._apply_one(number, block)
            if block is not before:
                self._note_inputs(number, block)
        return block

    def _note_inputs(self, number: int, block: Block) -> None:
        """Note what the inputs of the block's linears look like after step `number`, on the first row held back."""
        if self.held_out is None or not self.held_out.given.rows:
            return
        values = self.undone(self.held_out.float_model.values[0], number + 1)
        hooks = input_hooks(block, self.context.prefix)
        hooks = {x: hooks[x] for x, scheme in block.schemes.items() if scheme != TABLE_SCHEME}
        found = input_figures(self.program, block.segment, block.overrides(), values, hooks)
        stage = self.plan.steps[number].handler.name if number >= 0 else "float"
        self.held_out.figures.note_inputs(stage, found)

    def _apply_one(self, number: int, block: Block) -> Block:
        step = self.plan.steps[number]
        names = block.all_weights
        touched = [b for b in step.sites if any(e.parameter in names for e in (*b.writers, *b.readers))]
        reached = [linear for linear in block.linears if linear.path in step.online]
        statistics = self._statistics(number, block, touched, reached)
        self._make_sites(number, block, touched, statistics)
        folded = with_folds(block, self.sites[number], touched)
        found = {x: self._input_transform(number, x, folded, statistics) for x in reached}
        changed = {x: transform for x, transform in found.items() if transform != block.input_transforms[x]}
        if not touched and not changed:
            return block
        after = folded.with_input_transforms(changed)
        if changed:
            self.changed.setdefault(step.handler.name, []).extend(linear.path for linear in changed)
        if touched or any(transform.online != block.input_transforms[x].online for x, transform in changed.items()):
            self._check(number, block, after, changed, touched)
        return after

    def _make_sites(self, number: int, block: Block, touched: Sequence[Basis], statistics: Mapping[str, Any]) -> None:
        """Make the transforms of the bases that no block before has touched."""
        step, sites = self.plan.steps[number], self.sites[number]
        for basis in touched:
            if basis not in sites:
                generator = derived_generator(self.context.seed, number, basis.index)
                context = BasisContext(basis, statistics, block.all_weights, self.plan.reader_schemes, generator)
                sites[basis] = step.handler.transform(context)

    def _input_transform(
        self, number: int, linear: Linear, block: Block, statistics: Mapping[str, Any]
    ) -> InputTransform:
        """Return what a pass puts in front of one linear; without data it sees no more than the shape of its weight.

        So experts that are not held need not be read for it.
        """
        step = self.plan.steps[number]
        shape_alone = step.handler.needs is None and linear in block.apart
        together = [x for x in block.linears if x.source is linear.source]
        context = LinearContext(
            path=linear.path,
            basis=step.bases.reading(linear.weight),
            statistic=statistics.get(linear.weight),
            weight=torch.empty(1, linear.columns, device="meta") if shape_alone else block.weight(linear),
            weights=map(block.weight, together),
            input_transform=block.input_transforms[linear],
            scheme=block.schemes[linear],
            generator=derived_generator(self.context.seed, number, zlib.crc32(linear.source.name.encode())),
        )
        return step.handler.input_transform(context)

    def _statistics(
        self, number: int, block: Block, touched: Sequence[Basis], reached: Sequence[Linear]
    ) -> dict[str, Statistic]:
        """Return the statistics that a pass needs of this block's linear inputs, and those of the whole model.

        A linear that no row has reached has none.
        """
        needs = self.plan.steps[number].handler.needs
        found = seen(self.surveys.get(number, {}))
        if needs is None or (not reached and all(basis in self.sites[number] for basis in touched)):
            return found
        ahead = SequentialRunner.of(self.program, (self.undone(values, number) for values in self.calibration.values))
        collected = ahead.collect_without_advancing(
            block.segment, block.overrides(), block.linears, needs, input_hooks(block, self.context.prefix)
        )
        return found | seen(merged(collected, needs, self.context.ranks))

    def undone(self, values: Values, number: int = 0) -> Values:
        """Return values between blocks, which all steps have transformed, as they were before step `number`."""
        for step, sites in reversed(list(zip(self.plan.steps, self.sites, strict=True))[number:]):
            values = equivalence.in_coordinates(values, step.bases, sites, invert=True)
        return values

    def _check(
        self,
        number: int,
        block: Block,
        after: Block,
        changed: Mapping[Linear, InputTransform],
        touched: Sequence[Basis],
    ) -> None:
        """Run the equivalence check on a pass, in float64 if float32 is not enough; name the basis of a wrong fold."""
        step, sites, segment = self.plan.steps[number], self.sites[number], block.segment
        probes = [self.undone(values, number) for values in self.probes.values]
        compare = functools.partial(equivalence.max_relative_difference, self.program, segment, bases=step.bases)
        found = compare(block.overrides(), after.overrides(), probes, sites=sites)
        allowed, blame = equivalence.TOLERANCE, {}
        if found > allowed:
            apart = {linear: found.changed(Tensor.double) for linear, found in block.apart.items()}
            wide = replace(block, weights={name: W.double() for name, W in block.weights.items()}, apart=apart)
            probes = [{node: map_aggregate(x, equivalence.widened) for node, x in values.items()} for values in probes]
            before = equivalence.in_float64(segment, wide.overrides())
            after = with_folds(wide, sites, touched).with_input_transforms(changed)
            found = compare(before, equivalence.in_float64(segment, after.overrides()), probes, sites=sites)
            allowed = equivalence.FLOAT64_TOLERANCE
            for basis in touched if found > allowed else ():
                alone = equivalence.in_float64(segment, with_folds(wide, sites, [basis]).overrides())
                difference = compare(before, alone, probes, sites={basis: sites[basis]})
                blame[equivalence.describe_basis(basis)] = difference
        self.differences.setdefault(step.handler.name, {})[segment.name] = found
        equivalence.require_equivalent(step.handler.name, found, allowed, blame, segment)


def seen(statistics: Mapping[str, Statistic]) -> dict[str, Statistic]:
    """Return the statistics of linears that rows have reached.

    Raises:
        QuantizeError: a number is not finite; the message names the weight and the value.
    """
    found: dict[str, Statistic] = {}
    for name, statistic in statistics.items():
        try:
            found |= {name: statistic} if statistic.check() is not None else {}
        except ValueError as error:
            raise QuantizeError(
                f"the calibration activations in front of {name} are not finite: {error}; check the model and the text"
            ) from None
    return found


def with_folds(block: Block, sites: equivalence.Sites, touched: Sequence[Basis]) -> Block:
    """Return a block whose weights have absorbed the transforms of some bases."""
    weights, apart = dict(block.weights), dict(block.apart)
    for basis in touched:
        weights |= fold(basis, sites[basis], weights)
        apart = {linear: found.folded(basis, sites[basis]) for linear, found in apart.items()}
    return replace(block, weights=weights, apart=apart)


def input_hooks(block: Block, prefix: PrefixTokens) -> dict[Linear, Callable[[Tensor], Tensor]]:
    """Return for each linear a function from its input to what the weight meets, without the rows of the prefix.

    The rows of experts are in another order, so that those of the prefix are among them.
    """
    return {
        linear: lambda x, found=found, rest=rest: found.transform(rest(x))  # type: ignore[misc]
        for linear, found in block.input_transforms.items()
        for rest in [prefix.rest if linear.experts is None else PrefixTokens().rest]
    }
