"""Move activation outliers into the weights, channel by channel."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from quantize.passes.base import PASSES, BasisContext
from quantize.passes.scaling import Scaling, best_scale, live, reach
from quantize.transforms.fold import Diagonal, Transform

GRID = tuple(i / 20 for i in range(21))


@PASSES.register("smoothquant")
class SmoothQuant(Scaling):
    """s_j = max|X_j|^α / max|W_j|^(1-α), X ← X / s, W ← W · s (Xiao et al. 2022, arXiv 2211.10438, equation 4).

    Attributes:
        alpha: the migration strength in [0, 1]; 0 leaves the difficulty in the activations. `search` takes, for each
            basis, the one of 21 values that gives its linears the least error with rounded weights and activations.
    """

    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["search"] = 0.5

    def transform(self, context: BasisContext) -> Transform:
        """Return T = diag(1/s); a channel that is always zero, or that no weight reads, keeps s = 1."""
        X, W = reach(context)
        if self.alpha == "search":
            return Diagonal(1 / best_scale(context, (scale(X, W, alpha) for alpha in GRID)))
        return Diagonal(1 / scale(X, W, self.alpha))


def scale(X: Tensor, W: Tensor, alpha: float) -> Tensor:
    """Return s of equation 4 for max|X_j| and max|W_j|, [dim] each."""
    return live(X**alpha / W ** (1 - alpha), X, W)
