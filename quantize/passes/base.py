"""What a pass is, and what it is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantize.calibration.statistics import Statistic
from quantize.graph.basis import Basis
from quantize.graph.transform_group import AllowedTransforms
from quantize.recipe.registry import Registry
from quantize.recipe.scheme import Data, Scheme
from quantize.transforms.fold import Diagonal, Transform
from quantize.transforms.online import InputTransform

PASSES = Registry("pass")


@dataclass(frozen=True)
class BasisContext:
    """A basis to transform.

    Attributes:
        basis: what T acts on.
        statistics: of the inputs of linears, by the name of the weight; other readers have none.
        weights: the block's parameters by name, after the passes before.
        schemes: what the linears are quantized to, by the name of the weight; others stay in floating point.
        generator: private, the same for the same recipe and basis.
    """

    basis: Basis
    statistics: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    schemes: Mapping[str, Scheme]
    generator: torch.Generator

    @property
    def reader_schemes(self) -> dict[str, Scheme]:
        """The schemes of those that read the basis, in this block or another."""
        return {e.parameter: self.schemes[e.parameter] for e in self.basis.readers if e.parameter in self.schemes}

    def readers(self) -> Iterator[tuple[Any, Tensor, Tensor, Scheme | None]]:
        """For each parameter of the block that reads the basis: statistic, weight [N, K], index [copies, dim], scheme.

        The index says which of the K columns are channels of the basis, as often as the parameter reads them.
        """
        for edge in self.basis.readers:
            if edge.parameter in self.weights:
                W = self.weights[edge.parameter].movedim(edge.axis, -1).flatten(0, -2)
                yield self.statistics.get(edge.parameter), W, edge.index, self.schemes.get(edge.parameter)

    def inputs(self) -> Tensor:
        """Rows of the channels of the basis [rows, dim], from `Rows` of the inputs of all linears that read it."""
        return torch.cat(
            [
                self.statistics[edge.parameter].value[:, index]
                for edge in self.basis.readers
                if edge.parameter in self.statistics
                for index in edge.index
            ]
        )


@dataclass(frozen=True)
class LinearContext:
    """A linear that is quantized, and what is in front of it.

    Attributes:
        path: its module.
        basis: what it reads, if that is one basis.
        statistic: of its input behind `input_transform`; None without `Pass.needs`.
        weight: [N, K] behind `input_transform`.
        input_transform: what the passes before have put there.
        scheme: what it is quantized to.
        generator: private, the same for all linears that share an input.
    """

    path: str
    basis: Basis | None
    statistic: Any
    weight: Tensor
    input_transform: InputTransform
    scheme: Scheme
    generator: torch.Generator

    @property
    def rows(self) -> Tensor | None:
        """The sample of a statistic `Rows`; None where none was asked for, or nothing reached the linear."""
        return None if self.statistic is None else self.statistic.value


class Pass(Data):
    """One outlier handler; its fields are the recipe's parameters, nothing else.

    Attributes:
        name: what recipes call it.
        legal: a basis must admit this group.
        needs: the statistic of linear inputs that `transform` and `input_transform` are given; None for none.
        cross_block: with `needs`, act on bases that run through several blocks as well; the float model is run once
            more.
        folds_gains: after the pass the gains that write its sites are ones.
        never_after: names of passes that must not come before this one, and why.
    """

    name: ClassVar[str]
    legal: ClassVar[AllowedTransforms] = AllowedTransforms.NONE
    needs: ClassVar[type[Statistic] | None] = None
    cross_block: ClassVar[bool] = False
    folds_gains: ClassVar[bool] = False
    never_after: ClassVar[Mapping[str, str]] = {}

    def check(self, scheme: Scheme) -> None:
        """Refuse a scheme that the pass is not for.

        Raises:
            UsageError: why, and what to do.
        """
        del scheme

    def selects(self, basis: Basis) -> bool:
        """Whether to transform a basis that is legal, written and read."""
        del basis
        return False

    def transform(self, context: BasisContext) -> Transform:
        """T for one basis on which the pass acts."""
        return Diagonal(torch.ones(context.basis.dim))

    def transforms_input(self, basis: Basis | None, columns: int) -> bool:
        """Whether `input_transform` may change what is in front of a linear of `columns` inputs that reads `basis`."""
        del basis, columns
        return False

    def input_transform(self, context: LinearContext) -> InputTransform:
        """What shall be in front of a linear: `context.input_transform`, or more."""
        return context.input_transform

    def sites(self, bases: tuple[Basis, ...]) -> tuple[Basis, ...]:
        """The bases to transform."""
        return tuple(b for b in bases if self.legal in b.group and b.writers and b.readers and self.selects(b))


def input_error(context: LinearContext, X: Tensor, input_transform: InputTransform) -> float:
    """‖(X̂ - X) Wᵀ‖²: what rounding a linear's input X [rows, K] behind `context.input_transform` costs its output.

    `input_transform` is `context.input_transform` with other activation arguments, or one more transform that no weight
    absorbs.
    """
    behind = InputTransform(input_transform.online[len(context.input_transform.online) :], input_transform.activations)
    return float(((behind.quantized(X) - X) @ context.weight.T).square().sum())
