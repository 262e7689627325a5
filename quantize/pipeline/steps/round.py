"""Linears that share an input are rounded together, by the Gram matrix of what all ranks saw of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from quantize.calibration.gram_sums import fill_lower, gram_factors
from quantize.calibration.runner import SequentialRunner
from quantize.calibration.statistics import Gram
from quantize.errors import QuantizeError
from quantize.formats import get_format
from quantize.formats.qtensor import QTensor
from quantize.graph.interpreter import Overrides
from quantize.graph.linears import Linear
from quantize.nn.prefix_tokens import PrefixTokens
from quantize.pipeline.distributed import SingleProcess
from quantize.pipeline.memory import trim_heap
from quantize.pipeline.plan import Plan
from quantize.transforms.online import InputTransform


@dataclass(frozen=True)
class WeightRounder:
    """Rounds weights on the calibration activations as they are when it is asked.

    Attributes:
        ranks: the processes that share the calibration data.
        leading: the tokens in front of every sequence, which do not count.
        calibration, float_reference: activations of the quantized and of the float model.
    """

    plan: Plan
    ranks: SingleProcess
    leading: PrefixTokens
    calibration: SequentialRunner
    float_reference: SequentialRunner

    def same_input_groups(
        self, group: Sequence[Linear], input_transforms: Mapping[str, InputTransform], dtypes: Mapping[str, torch.dtype]
    ) -> list[list[Linear]]:
        """Of linears that share an input, those that see the same of it; they are rounded together."""
        parts: dict[object, list[Linear]] = {}
        for linear in group:
            parts.setdefault((self._seen(input_transforms[linear.path]), dtypes[linear.weight]), []).append(linear)
        return list(parts.values())

    def _seen(self, input_transform: InputTransform) -> object:
        """What a Gram matrix depends on."""
        return input_transform if self.plan.quantizer.needs_float_reference else input_transform.rotations

    def _gram(self, source: fx.Node, columns: int, input_transform: InputTransform) -> Gram:
        """Gram matrix of one input; beside the float model's, if the quantizer asks for it, of the rounded input."""
        gram, float_reference = Gram(), self.plan.quantizer.needs_float_reference
        totals = gram.totals(columns, 1 + float_reference)
        self.ranks.sum_products(totals, (gram_factors(*seen) for seen in self._inputs(source, input_transform)))
        fill_lower(totals[0])
        seen = sum(self.leading.rest(values[source]).numel() for values in self.calibration.values) // columns
        gram.rows = sum(self.ranks.gather(seen))
        return gram

    def _inputs(self, source: fx.Node, input_transform: InputTransform) -> Iterator[tuple[Tensor, Tensor | None]]:
        """What `Gram.update` takes, batch by batch."""
        rest = self.leading.rest
        if not self.plan.quantizer.needs_float_reference:
            return ((input_transform.rotate(rest(values[source])), None) for values in self.calibration.values)
        pairs = zip(self.calibration.values, self.float_reference.values, strict=True)
        return (
            (input_transform.quantized(rest(v[source])), input_transform.rotate(rest(float_reference[source])))
            for v, float_reference in pairs
        )

    def quantize(
        self,
        part: Sequence[Linear],
        state: Overrides,
        input_transforms: Mapping[str, InputTransform],
        dtypes: Mapping[str, torch.dtype],
    ) -> list[QTensor]:
        """Round the weights of linears that see the same input."""
        quantizer, first = self.plan.quantizer, part[0]
        trim_heap()
        gram = self._gram(first.source, first.columns, input_transforms[first.path]) if quantizer.needs_gram else None
        trim_heap()
        weights = [linear.as_out_in(state.weights[linear.weight]) for linear in part]
        mine = [W[self.ranks.shard_slice(len(W))] for W in weights] if self._splits(weights) else weights
        try:
            found = quantizer.quantize_group(mine, self.plan.recipe.weights, gram, dtypes[first.weight])
        except QuantizeError as error:
            raise QuantizeError(f"{', '.join(linear.path for linear in part)}: {error}") from None
        if not self._splits(weights):
            return found
        shares = self.ranks.gather([weight.tensors() for weight in found])
        return [weight.cat_rows(of_all) for weight, of_all in zip(found, zip(*shares, strict=True), strict=True)]

    def _splits(self, weights: Sequence[Tensor]) -> bool:
        """Whether each rank rounds some rows of the weights: rows are rounded apart, but for a global scale."""
        whole = get_format(self.plan.recipe.weights.format).has_global_scale
        return 1 < self.ranks.count <= min(map(len, weights)) and not whole
