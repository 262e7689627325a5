"""The experts of a block: which rows they are rounded on, what the referee keeps, and how many tokens each saw."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from quantize.calibration.runner import SequentialRunner
from quantize.formats.qtensor import QTensor
from quantize.graph.experts import nodes_between
from quantize.graph.interpreter import Overrides
from quantize.graph.linears import Linear
from quantize.graph.program import Program
from quantize.pipeline.block import Block, Product
from quantize.pipeline.context import RunContext
from quantize.pipeline.plan import Plan
from quantize.pipeline.steps.all_experts import AllTokens
from quantize.pipeline.steps.expert_rows import ExpertRows
from quantize.pipeline.steps.experts import ExpertRounder, Rows, joined
from quantize.pipeline.steps.referee import Referee
from quantize.pipeline.steps.stream_experts import ExpertFile


@dataclass(frozen=True)
class BlockExperts:
    """Rounds the experts of one block.

    Attributes:
        program, plan, context: the program, the plan and the context of the run.
        calibration, float_reference: the activations of the two models, which the caller advances.
        block: the block.
        states: what the block runs with in the two models.
        referee: the referee of the block.
        tokens: how many tokens each expert saw, by the path of the experts; it is added to.
        file: where experts are written that the block does not hold.
        ahead: weights that were rounded already, where all tokens go through all experts.
    """

    program: Program
    plan: Plan
    context: RunContext
    calibration: SequentialRunner
    float_reference: SequentialRunner
    block: Block
    states: tuple[Overrides, Overrides]
    referee: Referee
    tokens: dict[str, list[int]]
    file: ExpertFile | None = None
    ahead: dict[Linear, QTensor] = field(default_factory=dict)

    def quantize(self, part: Sequence[Linear]) -> list[Product]:
        """Round experts that share an input, in front of whose product both models stand."""
        if part[0] not in self.block.apart:
            weights = zip(part, joined(self._rounded(part)), strict=True)
            return [self.block.quantize(linear, weight, self.context.prefix) for linear, weight in weights]
        assert self.file is not None
        for expert, made in enumerate(self._rounded(part)):
            for linear, weight in zip(part, made, strict=True):
                self.file.put(linear, expert, weight)
        return [self.file.filed(linear) for linear in part]

    def _rounded(self, part: Sequence[Linear]) -> Iterator[Sequence[QTensor]]:
        """Yield for each expert the rounded weights of the linears."""
        first, references = part[0], self.float_reference.values if self.plan.quantizer.needs_float_reference else ()
        routed = ExpertRows(self.program, first, self.calibration.values, references)
        rounder = self._rounder(part, routed)
        if self.calibration.values:
            self.tokens.update({linear.path: rounder.counts for linear in part})
        if first in self.ahead:
            return self._judged(first, self.ahead.pop(first))
        if self.plan.recipe.calibrate_all_experts and self.program.gathers_tokens(first):
            rounder = self._rounder(part, self._all_tokens(first, first))
        return rounder.quantize(functools.partial(self.referee.choose_expert, part, self.block))

    def quantize_ahead(self, part: Sequence[Linear]) -> None:
        """Round the experts that read what experts compute that were just rounded, while all tokens are at hand."""
        if not (self.plan.recipe.calibrate_all_experts and self.plan.quantizer.needs_gram):
            return
        for producer in (x for x in part if x.offsets is not None and self.program.gathers_tokens(x)):
            for linear in (x for x in self.block.schemes if x.offsets is producer.offsets and x not in part):
                ahead = linear.path not in self.plan.kept and not self.program.gathers_tokens(linear)
                if ahead and nodes_between(producer, linear) is not None:
                    rounder = self._rounder([linear], self._all_tokens(producer, linear))
                    (self.ahead[linear],) = joined(rounder.quantize(lambda _, weights: weights))

    def _rounder(self, part: Sequence[Linear], rows: Rows) -> ExpertRounder:
        return ExpertRounder(part, self.block, self.plan.quantizer, rows, self.context)

    def _all_tokens(self, producer: Linear, linear: Linear) -> AllTokens:
        references = self.float_reference.values if self.plan.quantizer.needs_float_reference else ()
        return AllTokens(self.program, producer, linear, self.calibration.values, references, self.states)

    def _judged(self, linear: Linear, weight: QTensor) -> Iterator[Sequence[QTensor]]:
        """Yield the weights of experts that the referee has chosen."""
        experts = linear.experts or 1
        for expert in range(experts):
            yield self.referee.choose_expert([linear], self.block, expert, [weight.expert(expert, experts)])
