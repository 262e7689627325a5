"""GPTQ: round column by column, the columns to come making up for each error."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from quantize.calibration.statistics import Gram
from quantize.errors import QuantizeError
from quantize.formats.qtensor import QTensor
from quantize.kernels.reference import round_to_grid
from quantize.quantizers.base import QUANTIZERS, Quantizer, find_grid
from quantize.scheme import WeightArgs


@QUANTIZERS.register("gptq")
class GPTQ(Quantizer):
    """Frantar et al. 2022, arXiv 2210.17323, algorithm 1, with activation order; grids are fixed beforehand.

    Attributes:
        mse: shrink scales to the least rounding error first.
        damp: part of the mean diagonal added to the Hessian.
        act_order: take columns by falling diagonal of the Hessian.
        block_size: columns between two updates of all the columns to come.
    """

    needs_gram: ClassVar[bool] = True
    mse: bool = True
    damp: float = Field(0.01, gt=0)
    act_order: bool = True
    block_size: int = Field(128, ge=1)

    def quantize(self, W: Tensor, args: WeightArgs, gram: Gram | None, scale_dtype: torch.dtype) -> QTensor:
        """Round W [N, K] to the least error of W X, X the inputs that `gram` saw."""
        if gram is None or gram.value is None:
            raise QuantizeError("GPTQ needs calibration data, and none reached this layer")
        H = 2 / gram.rows * gram.value.double()
        dead = H.diagonal() == 0
        W = W.masked_fill(dead, 0)
        H.diagonal().masked_fill_(dead, 1)
        scale, zero_point = find_grid(W, args, self.mse, scale_dtype)
        order = H.diagonal().argsort(descending=True, stable=True) if self.act_order else torch.arange(len(H))
        group = order // (args.group_size or W.shape[1])
        q = self._round(W[:, order], inverse_factor(H[order][:, order], self.damp), scale[:, group], zero_point[:, group], args)
        return QTensor.pack(q[:, order.argsort()], scale.to(scale_dtype), None if args.symmetric else zero_point, args)

    def _round(self, W: Tensor, U: Tensor, scale: Tensor, zero_point: Tensor, args: WeightArgs) -> Tensor:
        """Integers [N, K] of columns in the order given, each with its own scale and zero point [N, K]."""
        W, Q = W.clone(), torch.empty_like(W)
        for start in range(0, W.shape[1], self.block_size):
            block = slice(start, start + self.block_size)
            w, u, e = W[:, block].T.contiguous(), U[block, block], torch.empty_like(W[:, block].T)
            s, z = scale[:, block].T.contiguous(), zero_point[:, block].T.contiguous()
            for i in range(len(w)):
                Q[:, start + i] = q = round_to_grid(w[i], s[i], z[i], args.num_bits)
                e[i] = (w[i] - (q - z[i]) * s[i]) / u[i, i]
                w[i + 1 :] -= u[i, i + 1 :, None] * e[i]
            W[:, block.stop :] -= e.T @ U[block, block.stop :]
        return Q


def inverse_factor(H: Tensor, damp: float) -> Tensor:
    """U upper triangular, float32, with UᵀU = (H + damping)⁻¹; the damping grows tenfold until that exists.

    Raises:
        QuantizeError: not even a damping of a hundred times the mean diagonal helps.
    """
    mean, eye = H.diagonal().mean(), torch.eye(len(H), dtype=H.dtype)
    while damp <= 100:
        L, failed = torch.linalg.cholesky_ex(H + damp * mean * eye)
        if not failed:
            U, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
        if not failed:
            return U.float()
        damp *= 10
    raise QuantizeError("the Hessian of the inputs is not positive definite: the calibration activations are not finite")
