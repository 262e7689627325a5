"""The linears of a block are rounded by Gram matrices of all ranks' inputs, and those that share an input together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from quantize.calibration.gram_sums import fill_lower, gram_factors
from quantize.calibration.runner import SequentialRunner
from quantize.calibration.statistics import Gram
from quantize.errors import QuantizeError
from quantize.formats import get_format
from quantize.formats.qtensor import QTensor
from quantize.graph.interpreter import Overrides, free_replaced
from quantize.graph.linears import Linear
from quantize.graph.program import Program
from quantize.pipeline.block import Block, Product
from quantize.pipeline.context import RunContext
from quantize.pipeline.held_out_runs import HeldOutRuns
from quantize.pipeline.memory import trim_heap
from quantize.pipeline.plan import Plan
from quantize.pipeline.steps.block_experts import BlockExperts
from quantize.pipeline.steps.referee import Referee
from quantize.pipeline.steps.stream_experts import ExpertFile
from quantize.quantizers.grid import on_grid
from quantize.quantizers.rtn import RoundToNearest
from quantize.scheme.scheme import TABLE_SCHEME
from quantize.transforms.online import InputTransform


@dataclass(frozen=True)
class WeightRounder:
    """Rounds weights on the calibration activations, which it advances.

    Attributes:
        program, plan, context: the program, the plan and the context of the run.
        calibration, float_reference: the activations of the quantized and of the float model.
        held_out: rows on which rounding by calibration data must lose less than plain rounding.
        expert_tokens: how many tokens of the calibration data each expert saw, by the path of the experts.
        kept: the paths of the linears whose weights lay on a grid and were kept as they are.
    """

    program: Program
    plan: Plan
    context: RunContext
    calibration: SequentialRunner
    float_reference: SequentialRunner
    held_out: HeldOutRuns
    expert_tokens: dict[str, list[int]] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)

    def apply(
        self, block: Block, reference: Overrides, finish: bool, keep: bool, file: ExpertFile | None = None
    ) -> Block:
        """Round each linear on the outputs of those before it, and advance the activations through the block.

        Args:
            block: the block; its float weights are dropped as they are replaced, unless `keep` is given.
            reference: what the float model's block runs with.
            finish: whether to advance past the last linear as well; the float model's activations also if `keep` is
                given.
            keep: whether the float weights stay in the block.
            file: where experts are written that the block does not hold.
        """
        state = replace(block.overrides(), product_dtype=block.product_dtype)
        quantized = dict(block.quantized)
        quantized |= {x: self._rounded_head(x, block) for x, scheme in block.schemes.items() if scheme == TABLE_SCHEME}
        state.linears.update({node: module for linear, module in quantized.items() for node in linear.calls})
        if not keep:
            free_replaced(self.program, state, (linear.weight for linear in quantized))
        targets, kept = [linear for linear in block.schemes if linear not in quantized], set[Linear]()
        referee = Referee(self.program, self.held_out, self.context.prefix, self.plan.quantizer.needs_gram)
        experts = BlockExperts(
            self.program,
            self.plan,
            self.context,
            self.calibration,
            self.float_reference,
            block,
            (state, reference),
            referee,
            self.expert_tokens,
            file,
        )
        for sharing, *_ in zip(
            self.calibration.advance_to_linears(block.segment, state, targets, finish),
            self.float_reference.advance_to_linears(block.segment, reference, targets, finish or keep),
            referee.quantized.advance_to_linears(block.segment, state, targets, finish=False),
            referee.float_model.advance_to_linears(block.segment, reference, targets, finish=False),
            strict=True,
        ):
            own = self._on_grids(sharing, block)
            kept |= own.keys()
            together = self.rounded_together([linear for linear in sharing if linear not in own], block)
            for part in [*([linear] for linear in own), *together]:
                if part[0] not in own and part[0].experts is not None:
                    with naming(part):
                        modules = experts.quantize(part)
                elif part[0] in own:
                    modules = [block.quantize(part[0], own[part[0]], self.context.prefix)]
                else:
                    rounded = self.quantize(part, block, state, reference)
                    weights = zip(part, referee.choose(part, block, rounded, state, reference), strict=True)
                    modules = [block.quantize(linear, weight, self.context.prefix) for linear, weight in weights]
                for linear, module in zip(part, modules, strict=True):
                    quantized[linear] = module
                    state.linears.update(dict.fromkeys(linear.calls, module))
                with naming(part):
                    experts.quantize_ahead(part)
                if not keep:
                    free_replaced(self.program, state, (linear.weight for linear in part))
            trim_heap()
        self.kept.extend(linear.path for linear in targets if linear in kept)
        return replace(block, quantized=quantized, kept=frozenset(kept))

    def _on_grids(self, linears: Sequence[Linear], block: Block) -> dict[Linear, QTensor]:
        """Return the weights of those linears that the plan keeps and that lie on a grid as a whole, as they are."""
        found, kept = dict[Linear, QTensor](), [x for x in linears if x.path in self.plan.kept]
        for linear in kept:
            args, dtype, W = block.schemes[linear].weights, block.dtypes[linear.weight], block.weight(linear)
            if get_format(args.format).has_global_scale and linear.experts is not None:
                parts = [on_grid(x, args, dtype) for x in W.chunk(linear.experts)]
                whole = [x for x in parts if x is not None]
                weight = whole[0].cat_rows([x.tensors() for x in whole]) if len(whole) == linear.experts else None
            else:
                alike = [x for x in kept if x.experts is None and block.schemes[x].weights == args]
                weight = on_grid(W, args, dtype, [block.weight(x) for x in alike])
            found |= {linear: weight} if weight is not None else {}
        return found

    def _rounded_head(self, linear: Linear, block: Block) -> Product:
        """Round the linear that scores the vocabulary to nearest, whatever the quantizer, as its columns cost too much.

        Every rank rounds all of it, which takes no longer than to send a part of it.
        """
        W, args = block.weight(linear), block.schemes[linear].weights
        weight = RoundToNearest().quantize(W, args, None, block.dtypes[linear.weight])
        return block.quantize(linear, weight, self.context.prefix)

    def rounded_together(self, sharing: Sequence[Linear], block: Block) -> list[list[Linear]]:
        """Split linears that share an input into those that see the same of it and are rounded alike."""
        parts: dict[object, list[Linear]] = {}
        for linear in sharing:
            seen = self._seen(block.input_transforms[linear])
            key = (seen, block.dtypes[linear.weight], block.schemes[linear].weights)
            parts.setdefault(key, []).append(linear)
        together = list(parts.values())
        return together if self.context.placement.together else [[x] for part in together for x in part]

    def _seen(self, input_transform: InputTransform) -> object:
        """Return what a Gram matrix depends on."""
        return input_transform if self.plan.quantizer.needs_float_reference else input_transform.rotations

    def _gram(self, linear: Linear, block: Block, state: Overrides, reference: Overrides) -> Gram:
        """Return the Gram matrix of a linear's inputs, rounded if the quantizer compares with the float model's."""
        gram, float_reference = Gram(), self.plan.quantizer.needs_float_reference
        totals, ranks = gram.totals(linear.columns, 1 + float_reference, self.context.gram_device), self.context.ranks
        seen = 0

        def factors() -> Iterator[tuple[list[Tensor], Tensor]]:
            nonlocal seen
            for x, y in self._inputs(linear, block, state, reference):
                seen += x.numel() // linear.columns
                yield gram_factors(x, y, block.product_dtype)

        ranks.sum_products(totals, factors())
        fill_lower(totals[0])
        gram.rows = sum(ranks.gather(seen))
        return gram

    def _inputs(
        self, linear: Linear, block: Block, state: Overrides, reference: Overrides
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield the arguments of `Gram.update`, batch by batch and call by call.

        Rows of the prefix are not rounded, but weights multiply them like all others.
        """
        found, inputs = block.input_transforms[linear], self.calibration.inputs(block.segment, linear, state)
        if not self.plan.quantizer.needs_float_reference:
            return ((found.rotate(x), None) for x in inputs)
        expected, apart = self.float_reference.inputs(block.segment, linear, reference), self.context.prefix.apart
        pairs = zip(inputs, expected, strict=True)
        return ((apart(x, found.rotate, found.quantized), found.rotate(y)) for x, y in pairs)

    def quantize(self, part: Sequence[Linear], block: Block, state: Overrides, reference: Overrides) -> list[QTensor]:
        """Round the weights of linears that see the same input and have the same scheme for weights.

        `state` and `reference` are what the quantized and the float model's block run with.
        Linears that no calibration row reaches, such as experts, are rounded to nearest.

        Raises:
            QuantizeError: the quantizer cannot round them; the message names the linears.
        """
        quantizer, first, ranks = self.plan.quantizer, part[0], self.context.ranks
        args, dtype = block.schemes[first].weights, block.dtypes[first.weight]
        trim_heap()
        gram = self._gram(first, block, state, reference) if quantizer.needs_gram else None
        trim_heap()
        if gram is not None and not gram.rows:
            self.held_out.rounded_without_data += [linear.path for linear in part]
            return RoundToNearest().quantize_weights([block.weight(linear) for linear in part], args, None, dtype)
        weights = [block.weight(linear) for linear in part]
        # each rank rounds some rows, which do not depend on each other unless they share a global scale
        splits = 1 < ranks.count <= min(map(len, weights)) and not get_format(args.format).has_global_scale
        mine = [W[ranks.shard_slice(len(W))] for W in weights] if splits else weights
        with naming(part):
            found = quantizer.quantize_weights(mine, args, gram, dtype, block.product_dtype)
        if not splits:
            return found
        shares = ranks.gather([weight.tensors() for weight in found])
        return [weight.cat_rows(of_all) for weight, of_all in zip(found, zip(*shares, strict=True), strict=True)]


@contextlib.contextmanager
def naming(linears: Sequence[Linear]) -> Iterator[None]:
    """Name the linears in an error about them."""
    try:
        yield
    except QuantizeError as error:
        raise QuantizeError(f"{', '.join(linear.path for linear in linears)}: {error}") from None
