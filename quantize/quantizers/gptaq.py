"""GPTAQ: GPTQ that also makes up for the error that earlier layers have left in the input."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from quantize.calibration.statistics import Gram
from quantize.formats.qtensor import QTensor
from quantize.quantizers.base import QUANTIZERS
from quantize.quantizers.gptq import GPTQ
from quantize.scheme import WeightArgs


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

    def quantize(self, W: Tensor, args: WeightArgs, gram: Gram | None, scale_dtype: torch.dtype) -> QTensor:
        """Round W [N, K] to the least error of Ŵ X against W X'."""
        if gram is not None and gram.value is not None and gram.drift is not None and bool(gram.value.any()):
            W = W + self.alpha * correction(W, gram.value, gram.drift, self.damp)
        return super().quantize(W, args, gram, scale_dtype)


def correction(W: Tensor, H: Tensor, D: Tensor, damp: float) -> Tensor:
    """W D H⁻¹ [N, K]: what brings W X nearest to W X' in least squares, H = X Xᵀ damped as in GPTQ, which checks it."""
    H = H.double()
    H = H + damp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    solved: Tensor = torch.linalg.solve_ex(H, W.double() @ D.double(), left=False)[0]
    return solved.to(W.dtype)
