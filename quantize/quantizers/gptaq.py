"""GPTAQ: GPTQ that also makes up for the error that earlier layers have left in the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from quantize.calibration.statistics import Gram
from quantize.quantizers.base import QUANTIZERS
from quantize.quantizers.gptq import GPTQ
from quantize.quantizers.hessian import factor, fill_upper, solve


@QUANTIZERS.register("gptaq")
class GPTAQ(GPTQ):
    """Li et al. 2025, arXiv 2504.02692: min ‖Ŵ X - W X'‖², X' the float model's input and X the one that is rounded.

    The minimum over real weights, W + W D H⁻¹ with D = (X' - X) Xᵀ, is taken first and rounded by GPTQ; the paper
    spreads the same correction over the columns as it goes (its equation 15).

    D H⁻¹ is a regression, and few tokens of another kind of text settle it badly where X has little energy: there it
    fits noise, layer upon layer. A `ridge` leaves those directions alone: one of energy λ keeps λ / (λ + ridge · mean).

    Attributes:
        alpha: part of the correction in [0, 1].
        ridge: part of the mean diagonal that is added to the Hessian once more, for the correction alone.
    """

    needs_float_reference: ClassVar[bool] = True
    alpha: float = Field(0.5, ge=0, le=1)
    ridge: float = Field(0.0, ge=0)

    def target_weights(
        self, weights: Sequence[Tensor], gram: Gram, H: Tensor, d: Tensor, order: Tensor
    ) -> Sequence[Tensor]:
        """W + α W D (H + ridge · mean)⁻¹ for each W; without a ridge it brings W X nearest to W X', H damped."""
        D, gram.drift = gram.drift, None
        if D is None:
            return weights
        drifts = [(W @ D)[:, order] for W in weights]
        del D  # its place is taken by a second Hessian
        if self.ridge:
            H = H.clone()
            fill_upper(H)
            d = factor(H, self.ridge)
        back = order.argsort()
        return [W + self.alpha * solve(H, d, M)[:, back] for W, M in zip(weights, drifts, strict=True)]
