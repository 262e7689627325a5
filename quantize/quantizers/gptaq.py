"""GPTAQ: GPTQ that also makes up for the error that earlier layers have left in the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from quantize.calibration.statistics import Gram
from quantize.quantizers.base import QUANTIZERS
from quantize.quantizers.gptq import GPTQ
from quantize.quantizers.hessian import solve


@QUANTIZERS.register("gptaq")
class GPTAQ(GPTQ):
    """Li et al. 2025, arXiv 2504.02692: min ‖Ŵ X - W X'‖, X' the float model's input and X the one that is rounded.

    The minimum over real weights, W + W D H⁻¹ with D = (X' - X) Xᵀ, is taken first and rounded by GPTQ; the paper
    spreads the same correction over the columns as it goes (its equation 15).

    Attributes:
        alpha: part of the correction in [0, 1].
    """

    needs_exact: ClassVar[bool] = True
    alpha: float = Field(0.5, ge=0, le=1)

    def aimed_at(self, weights: Sequence[Tensor], gram: Gram, H: Tensor, d: Tensor, order: Tensor) -> Sequence[Tensor]:
        """W + α W D H⁻¹ for each W: what brings W X nearest to W X' in least squares, H damped."""
        D, gram.drift = gram.drift, None
        if D is None:
            return weights
        back = order.argsort()
        return [W + self.alpha * solve(H, d, (W @ D)[:, order])[:, back] for W in weights]
