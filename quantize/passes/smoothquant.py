"""Move activation outliers into the weights, channel by channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from quantize.calibration.statistics import Absmax, Statistic
from quantize.fold import Diagonal, Transform
from quantize.graph.basis import Basis
from quantize.graph.group import Group
from quantize.passes.base import PASSES, Pass


@PASSES.register("smoothquant")
class SmoothQuant(Pass):
    """s_j = max|X_j|^α / max|W_j|^(1-α), X ← X / s, W ← W · s (Xiao et al. 2022, arXiv 2211.10438, equation 4).

    Attributes:
        alpha: migration strength in [0, 1]; 0 leaves the difficulty in the activations.
    """

    legal: ClassVar[Group] = Group.POSITIVE_DIAGONAL
    needs: ClassVar[type[Statistic] | None] = Absmax
    alpha: float = Field(0.5, ge=0, le=1)

    def acts_on(self, basis: Basis) -> bool:
        """Bases that linears read."""
        return not any(edge.vector or edge.dual for edge in basis.readers)

    def transform(
        self, basis: Basis, statistics: Mapping[str, Statistic], weights: Mapping[str, Tensor], seed: torch.Generator
    ) -> Transform:
        """T = diag(1/s); a channel that is always zero, or that no weight reads, keeps s = 1."""
        del seed
        X, W = torch.zeros(basis.dim, dtype=torch.float64), torch.zeros(basis.dim, dtype=torch.float64)
        for edge in basis.readers:
            seen: Any = statistics.get(edge.parameter)
            columns = weights[edge.parameter].abs().movedim(edge.axis, -1).flatten(0, -2).amax(dim=0)
            for index in edge.index:
                X = X if seen is None else torch.maximum(X, seen.value[index].double())
                W = torch.maximum(W, columns[index].double())
        s = X**self.alpha / W ** (1 - self.alpha)
        return Diagonal(1 / torch.where((X > 0) & (W > 0), s, torch.ones_like(s)))
