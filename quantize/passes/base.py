"""What a pass is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from quantize.calibration.statistics import Statistic
from quantize.fold import Transform
from quantize.graph.basis import Basis
from quantize.graph.group import Group
from quantize.linear import OnlineHadamard
from quantize.registry import Registry
from quantize.scheme import Data

PASSES = Registry("pass")


class Pass(Data):
    """One outlier handler; its fields are the recipe's parameters, nothing else.

    Attributes:
        name: what recipes call it.
        legal: a basis must admit this group.
        needs: the statistic of linear inputs that `transform` is given, by weight; None for none.
        folds_gains: after the pass the gains that write its sites are ones.
    """

    name: ClassVar[str]
    legal: ClassVar[Group]
    needs: ClassVar[type[Statistic] | None] = None
    folds_gains: ClassVar[bool] = False

    @abstractmethod
    def acts_on(self, basis: Basis) -> bool:
        """Whether to transform a basis that is legal, written and read."""

    @abstractmethod
    def transform(
        self, basis: Basis, statistics: Mapping[str, Statistic], weights: Mapping[str, Tensor], seed: torch.Generator
    ) -> Transform:
        """T for one basis.

        Args:
            basis: what T acts on.
            statistics: of the inputs of the block's linears, by the name of the weight; other readers have none.
            weights: the block's parameters by name.
            seed: a private generator, the same for the same recipe and basis.
        """

    def online(self, basis: Basis | None, columns: int) -> OnlineHadamard | None:
        """What to run in front of a linear of `columns` inputs that reads `basis` (None: no single one)."""
        del basis, columns
        return None

    def sites(self, bases: tuple[Basis, ...]) -> tuple[Basis, ...]:
        """The bases to transform."""
        return tuple(b for b in bases if self.legal in b.group and b.writers and b.readers and self.acts_on(b))
