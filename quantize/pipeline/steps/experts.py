"""The experts of a stack are rounded one after the other, each on the rows that reach it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from quantize.calibration.gram_sums import fill_lower, gram_factors
from quantize.calibration.statistics import Gram
from quantize.formats.qtensor import QTensor
from quantize.graph.linears import Linear
from quantize.pipeline.block import Block
from quantize.pipeline.context import RunContext
from quantize.pipeline.steps.all_experts import AllTokens
from quantize.pipeline.steps.expert_rows import ExpertRows
from quantize.quantizers.base import Quantizer
from quantize.quantizers.rtn import RoundToNearest

FEW = 4  # rows for each column, below which an expert's Gram matrix is shrunk towards that of all rows
Judge = Callable[[int, Sequence[QTensor]], Sequence[QTensor]]
Rows = ExpertRows | AllTokens


@dataclass(frozen=True)
class ExpertRounder:
    """Rounds the experts of linears that share an input and have the same scheme for weights.

    At most three Gram matrices are held at a time: an expert's, that of all rows, and the quantizer's copy.

    Attributes:
        part: the linears.
        block: the block they lie in.
        quantizer: the quantizer.
        rows: the rows that reach the experts.
        context: the context of the run; each of its ranks has some of the batches.
    """

    part: Sequence[Linear]
    block: Block
    quantizer: Quantizer
    rows: Rows
    context: RunContext

    def quantize(self, judge: Judge) -> Iterator[Sequence[QTensor]]:
        """Yield for each expert the rounded weights [N, K] of the linears.

        An expert without rows is rounded to nearest.

        Args:
            judge: maps an expert and its weights, rounded by data, to those that are kept.
        """
        first, dtype = self.part[0], self.block.dtypes[self.part[0].weight]
        args, experts = self.block.schemes[first].weights, first.experts or 1
        counts = self.counts
        pooled = self._pooled(counts) if self.quantizer.needs_gram else None
        for expert in range(experts):
            own = [self.block.expert(linear, expert) for linear in self.part]
            if self.quantizer.needs_gram and counts[expert]:
                gram = shrunk(self._gram([expert], counts[expert]), pooled, first.columns)
                yield judge(expert, self.quantizer.quantize_weights(own, args, gram, dtype, self.block.product_dtype))
            else:
                quantizer = RoundToNearest() if self.quantizer.needs_gram else self.quantizer
                yield quantizer.quantize_weights(own, args, None, dtype)

    @functools.cached_property
    def counts(self) -> list[int]:
        """How many rows each expert sees."""
        return [sum(of_ranks) for of_ranks in zip(*self.context.ranks.gather(self.rows.counts), strict=True)]

    def _pooled(self, counts: Sequence[int]) -> Gram | None:
        """Return the Gram matrix of all experts' rows, if any expert with rows sees few."""
        few = any(0 < count < FEW * self.part[0].columns for count in counts)
        return self._gram(range(len(counts)), sum(counts)) if few else None

    def _gram(self, experts: Iterable[int], count: int) -> Gram:
        """Return the Gram matrix of some experts' rows, as `WeightRounder` makes that of a linear."""
        gram, references, found = (
            Gram(),
            self.quantizer.needs_float_reference,
            self.block.input_transforms[self.part[0]],
        )
        totals = gram.totals(self.part[0].columns, 1 + references, self.context.gram_device)
        pairs = (pair for expert in experts for pair in self.rows.of(expert, found))
        factors = (
            gram_factors(x, y, self.block.product_dtype)
            if references
            else gram_factors(y, None, self.block.product_dtype)
            for x, y in pairs
        )
        self.context.ranks.sum_products(totals, factors)
        fill_lower(totals[0])
        gram.rows = count
        return gram


def joined(experts: Iterable[Sequence[QTensor]]) -> list[QTensor]:
    """Return the weight [experts · N, K] of each linear, of what `ExpertRounder.quantize` yields."""
    of_linears = list(zip(*experts, strict=True))
    return [pieces[0].cat_rows([piece.tensors() for piece in pieces]) for pieces in of_linears]


def shrunk(gram: Gram, pooled: Gram | None, columns: int) -> Gram:
    """Return the Gram matrix of n rows, or if n is less than `FEW` times the columns K one that is nearer to all rows'.

    It is then the convex combination of both means with the weight n / (n + K), so that an expert that sees few tokens
    is rounded mostly for what all experts see.
    """
    if pooled is None or gram.rows >= FEW * columns:
        return gram
    weight = gram.rows / (gram.rows + columns)
    for own, other in ((gram.value, pooled.value), (gram.drift, pooled.drift)):
        if own is not None and other is not None:
            own.mul_(weight / gram.rows).add_(other, alpha=(1 - weight) / pooled.rows)
    return gram
