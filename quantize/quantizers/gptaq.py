"""GPTAQ is GPTQ that also corrects the error that earlier layers have left in the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from quantize.calibration.statistics import Gram
from quantize.quantizers.base import QUANTIZERS
from quantize.quantizers.gptq import GPTQ
from quantize.quantizers.hessian import factor, fill_upper, solve, times


@QUANTIZERS.register("gptaq")
class GPTAQ(GPTQ):
    """Minimizes ‖Ŵ X - W X'‖², where X' is the float model's input and X that of the rounded model.

    Source: Li et al. 2025, arXiv 2504.02692.

    The minimum over real weights, W + W D H⁻¹ with D = (X' - X) Xᵀ, is computed first and then rounded by GPTQ; the
    paper spreads the same correction over the columns as it goes (its equation 15).

    D H⁻¹ is a regression. Where X has little energy, few tokens or another kind of text determine it badly, so it fits
    noise, and more so layer after layer. A `ridge` leaves those directions alone: one of energy λ keeps
    λ / (λ + ridge · mean) of the correction.

    Attributes:
        alpha: the part of the correction that is applied, in [0, 1].
        ridge: the part of the mean diagonal that is added to the Hessian once more, for the correction alone.
    """

    needs_float_reference: ClassVar[bool] = True
    alpha: float = Field(0.5, ge=0, le=1)
    ridge: float = Field(0.0, ge=0)

    def target_weights(
        self, weights: Sequence[Tensor], gram: Gram, H: Tensor, d: Tensor, order: Tensor
    ) -> Sequence[Tensor]:
        """Return W + α W D (H + ridge · mean)⁻¹ for each W; without a ridge, α = 1 brings W X nearest to W X'."""
        D, gram.drift = gram.drift, None
        if D is None:
            return weights
        drifts = [times(W, D)[:, order] for W in weights]
        del D  # a second Hessian takes its memory
        if self.ridge:
            H = H.clone()
            fill_upper(H)
            d = factor(H, self.ridge, d.device)
        back = order.argsort()
        return [W + self.alpha * solve(H, d, M)[:, back] for W, M in zip(weights, drifts, strict=True)]
