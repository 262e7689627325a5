"""The base class of passes, and the contexts that they are given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantize.calibration.statistics import Statistic
from quantize.graph.allowed_transforms import AllowedTransforms
from quantize.graph.basis import Basis
from quantize.scheme.registry import Registry
from quantize.scheme.scheme import Data, Scheme
from quantize.transforms.fold import Diagonal, Transform
from quantize.transforms.online import InputTransform

PASSES = Registry("pass")


@dataclass(frozen=True)
class BasisContext:
    """A basis that a pass is to transform.

    Attributes:
        basis: the basis that T acts on.
        statistics: statistics of the inputs of linears, by the name of the weight; other readers have none.
        weights: the block's parameters by name, as the passes before have left them.
        schemes: the schemes of the linears by the name of the weight; those without one stay in floating point.
        generator: a generator for this pass and basis alone, which is the same for the same recipe.
    """

    basis: Basis
    statistics: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    schemes: Mapping[str, Scheme]
    generator: torch.Generator

    @property
    def device(self) -> torch.device:
        """Where the block's parameters are."""
        return next(iter(self.weights.values())).device

    @property
    def reader_schemes(self) -> dict[str, Scheme]:
        """The schemes of the linears that read the basis, in this block or another."""
        return {e.parameter: self.schemes[e.parameter] for e in self.basis.readers if e.parameter in self.schemes}

    def readers(self) -> Iterator[tuple[Any, Tensor, Tensor, Scheme | None]]:
        """Yield statistic, weight [N, K], index [copies, dim] and scheme of each of the block's readers of the basis.

        The index says which of the K columns are channels of the basis; a parameter that reads a channel several times
        has several copies.
        """
        for edge in self.basis.readers:
            if edge.parameter in self.weights:
                W = self.weights[edge.parameter].movedim(edge.axis, -1).flatten(0, -2)
                yield self.statistics.get(edge.parameter), W, edge.index.to(W.device), self.schemes.get(edge.parameter)

    def inputs(self) -> Tensor:
        """Return rows of the basis' channels [rows, dim], from `Rows` of the inputs of all linears that read it.

        If no row has reached any of them, it is one row of zeros.
        """
        found = [
            self.statistics[edge.parameter].value[:, index]
            for edge in self.basis.readers
            if edge.parameter in self.statistics
            for index in edge.index
        ]
        return torch.cat(found) if found else torch.zeros(1, self.basis.dim)


@dataclass(frozen=True)
class LinearContext:
    """A linear that is quantized, and what is in front of it.

    Attributes:
        path: the path of its module.
        basis: the basis that it reads; None if its input is not one basis.
        statistic: the statistic of its input behind `input_transform`; None if the pass has no `needs`.
        weight: its weight [N, K], after it has absorbed the transforms of `input_transform`.
        weights: those of all quantized linears of the block that share the input, read as they are asked for, once.
        input_transform: the input transform that the passes before have made.
        scheme: the scheme that it is quantized to.
        generator: a generator for this pass alone, which is the same for all linears that share an input.
    """

    path: str
    basis: Basis | None
    statistic: Any
    weight: Tensor
    weights: Iterable[Tensor]
    input_transform: InputTransform
    scheme: Scheme
    generator: torch.Generator

    @property
    def rows(self) -> Tensor | None:
        """The sample of a statistic `Rows`; None if none was asked for or nothing reached the linear."""
        return None if self.statistic is None else self.statistic.value


class Pass(Data):
    """One outlier handler. Its fields are the recipe's parameters and nothing else.

    Attributes:
        name: the name that recipes use.
        legal: the group of transforms that a basis must admit.
        needs: the statistic of linear inputs that `transform` and `input_transform` are given; None for none.
        cross_block: whether a pass with `needs` also acts on bases that run through several blocks, for which the float
            model is run once more.
        folds_gains: whether the gains that write its sites are ones after the pass.
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
            UsageError: the pass is not for this scheme; the message says why and what to do.
        """
        del scheme

    def selects(self, basis: Basis) -> bool:
        """Return whether to transform a basis that is legal, written and read."""
        del basis
        return False

    def transform(self, context: BasisContext) -> Transform:
        """Return T for one basis on which the pass acts."""
        return Diagonal(torch.ones(context.basis.dim, device=context.device))

    def transforms_input(self, basis: Basis | None, columns: int) -> bool:
        """Return whether `input_transform` may change anything for a linear of `columns` inputs that reads `basis`."""
        del basis, columns
        return False

    def input_transform(self, context: LinearContext) -> InputTransform:
        """Return the new input transform of a linear: `context.input_transform`, or one that does more."""
        return context.input_transform

    def sites(self, bases: tuple[Basis, ...]) -> tuple[Basis, ...]:
        """Return the bases to transform."""
        return tuple(b for b in bases if self.legal in b.allowed and b.writers and b.readers and self.selects(b))


def input_error(context: LinearContext, X: Tensor, input_transform: InputTransform) -> float:
    """Return ‖(X̂ - X) Wᵀ‖², the error that rounding a linear's input X [rows, K] makes in its output.

    X is the input behind `context.input_transform`. `input_transform` is that one with other activation arguments, or
    with one more transform that no weight absorbs.
    """
    behind = InputTransform(input_transform.online[len(context.input_transform.online) :], input_transform.activations)
    return float(((behind.quantized(X) - X) @ context.weight.T).square().sum())
