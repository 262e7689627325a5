"""Linears that share an input are rounded together, by the Gram matrix of what all ranks saw of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from quantize.calibration.runner import Runner
from quantize.calibration.statistics import Gram
from quantize.calibration.sums import factors, mirror
from quantize.errors import QuantizeError
from quantize.formats.qtensor import QTensor
from quantize.graph.execute import State
from quantize.graph.linears import Linear
from quantize.leading import Leading
from quantize.memory import give_back
from quantize.online import Front
from quantize.plan import Plan
from quantize.ranks import Ranks


@dataclass(frozen=True)
class GroupRounding:
    """Rounds weights on the calibration activations as they are when it is asked.

    Attributes:
        ranks: the processes that share the calibration data.
        leading: the tokens in front of every sequence, which do not count.
        calibration, exact: activations of the quantized and of the float model.
    """

    plan: Plan
    ranks: Ranks
    leading: Leading
    calibration: Runner
    exact: Runner

    def parts(
        self, group: Sequence[Linear], fronts: Mapping[str, Front], dtypes: Mapping[str, torch.dtype]
    ) -> list[list[Linear]]:
        """Of linears that share an input, those that see the same of it; they are rounded together."""
        parts: dict[object, list[Linear]] = {}
        for linear in group:
            parts.setdefault((self._seen(fronts[linear.path]), dtypes[linear.weight]), []).append(linear)
        return list(parts.values())

    def _seen(self, front: Front) -> object:
        """What a Gram matrix depends on."""
        return front if self.plan.quantizer.needs_exact else front.rotations

    def _gram(self, source: fx.Node, columns: int, front: Front) -> Gram:
        """Gram matrix of one input; beside the float model's, if the quantizer asks for it, of the rounded input."""
        gram, exact = Gram(), self.plan.quantizer.needs_exact
        totals = gram.totals(columns, 1 + exact)
        self.ranks.sum_products(totals, (factors(*seen) for seen in self._inputs(source, front)))
        mirror(totals[0])
        seen = sum(self.leading.rest(values[source]).numel() for values in self.calibration.values) // columns
        gram.rows = sum(self.ranks.gather(seen))
        return gram

    def _inputs(self, source: fx.Node, front: Front) -> Iterator[tuple[Tensor, Tensor | None]]:
        """What `Gram.update` takes, batch by batch."""
        rest = self.leading.rest
        if not self.plan.quantizer.needs_exact:
            return ((front.rotate(rest(values[source])), None) for values in self.calibration.values)
        pairs = zip(self.calibration.values, self.exact.values, strict=True)
        return ((front.quantized(rest(v[source])), front.rotate(rest(exact[source]))) for v, exact in pairs)

    def quantize(
        self, part: Sequence[Linear], state: State, fronts: Mapping[str, Front], dtypes: Mapping[str, torch.dtype]
    ) -> list[QTensor]:
        """Round the weights of linears that see the same input."""
        quantizer, first = self.plan.quantizer, part[0]
        give_back()
        gram = self._gram(first.source, first.columns, fronts[first.path]) if quantizer.needs_gram else None
        give_back()
        weights = [linear.oriented(state.weights[linear.weight]) for linear in part]
        mine = [W[self.ranks.part_of(len(W))] for W in weights] if self._splits(weights) else weights
        try:
            found = quantizer.quantize_together(mine, self.plan.recipe.weights, gram, dtypes[first.weight])
        except QuantizeError as error:
            raise QuantizeError(f"{', '.join(linear.path for linear in part)}: {error}") from None
        if not self._splits(weights):
            return found
        shares = self.ranks.gather([weight.tensors() for weight in found])
        return [weight.joined(of_all) for weight, of_all in zip(found, zip(*shares, strict=True), strict=True)]

    def _splits(self, weights: Sequence[Tensor]) -> bool:
        """Whether each rank rounds some rows of the weights: they are rounded apart, but for NVFP4's common unit."""
        return 1 < self.ranks.count <= min(map(len, weights)) and self.plan.recipe.weights.format != "nvfp4"
