"""GPTQ: round column by column, the columns to come making up for each error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from quantize.calibration.statistics import Gram
from quantize.errors import QuantizeError
from quantize.formats.qtensor import QTensor
from quantize.quantizers.base import QUANTIZERS, Quantizer, find_grid, nearest, pack
from quantize.scheme import WeightArgs


@QUANTIZERS.register("gptq")
class GPTQ(Quantizer):
    """Frantar et al. 2022, arXiv 2210.17323, algorithm 1, with activation order; grids are fixed beforehand.

    Attributes:
        mse: fit scales first, to the least rounding error weighted by the root mean square of each input.
        damp: part of the mean diagonal added to the Hessian.
        act_order: take columns by falling diagonal of the Hessian.
        block_size: columns between two updates of all the columns to come.
        sweeps: rounds of coordinate descent afterwards, which may move a column again
            (QuantEase, Behdin et al. 2023, arXiv 2309.01885, algorithm 1).
    """

    needs_gram: ClassVar[bool] = True
    mse: bool = True
    damp: float = Field(0.01, gt=0)
    act_order: bool = True
    block_size: int = Field(128, ge=1)
    sweeps: int = Field(2, ge=0)

    def quantize(self, W: Tensor, args: WeightArgs, gram: Gram | None, scale_dtype: torch.dtype) -> QTensor:
        """Round W [N, K] to the least error of W X, X the inputs that `gram` saw."""
        if gram is None or gram.value is None or not gram.rows:
            raise QuantizeError(
                "GPTQ needs calibration data, and none reached this layer; leave it out with --ignore, "
                'or round without data (quantizer = { name = "rtn" })'
            )
        H = gram.value.double() / gram.rows
        scale, zero_point = find_grid(W, args, scale_dtype, self.mse, H.diagonal().sqrt().float())
        dead = H.diagonal() == 0
        H.diagonal()[dead] = 1
        given, W = W, W.masked_fill(dead, 0)
        order = H.diagonal().argsort(descending=True, stable=True) if self.act_order else torch.arange(len(H))
        columns = Columns(scale, zero_point, order // (args.group_size or W.shape[1]), args)
        W, H = W[:, order], H[order][:, order]
        q = compensated(W, inverse_factor(H, self.damp), columns, self.block_size)
        H.diagonal().add_(self.damp * H.diagonal().mean())
        for _ in range(self.sweeps):
            q = swept(W, q, H.float(), columns, self.block_size)
        return pack(given, q[:, order.argsort()], scale, zero_point, args, scale_dtype)


@dataclass(frozen=True)
class Columns:
    """The grid of each column, by the group it is in: scale, zero_point [N, G], group [K]."""

    scale: Tensor
    zero_point: Tensor
    group: Tensor
    args: WeightArgs

    def round(self, w: Tensor, column: int) -> Tensor:
        """Integers [N] of one column w [N]."""
        g = self.group[column]
        return nearest(w, self.scale[:, g], self.zero_point[:, g], self.args)

    def value(self, q: Tensor, column: int | slice) -> Tensor:
        """The weights that the integers of some columns stand for."""
        g = self.group[column]
        return (q - self.zero_point[:, g]) * self.scale[:, g]


def compensated(W: Tensor, U: Tensor, columns: Columns, block_size: int) -> Tensor:
    """GPTQ: integers [N, K]; the error of each column is made up for by those after it, block by block."""
    W, Q = W.clone(), torch.empty_like(W)
    for start in range(0, W.shape[1], block_size):
        block = slice(start, min(start + block_size, W.shape[1]))
        w, u, e = W[:, block].T.contiguous(), U[block, block], torch.empty_like(W[:, block].T)
        for i in range(len(w)):
            Q[:, start + i] = q = columns.round(w[i], start + i)
            e[i] = (w[i] - columns.value(q, start + i)) / u[i, i]
            w[i + 1 :] -= u[i, i + 1 :, None] * e[i]
        W[:, block.stop :] -= e.T @ U[block, block.stop :]
    return Q


def swept(W: Tensor, Q: Tensor, H: Tensor, columns: Columns, block_size: int) -> Tensor:
    """One round of coordinate descent on tr((W - Ŵ) H (W - Ŵ)ᵀ): each column again, given all others."""
    R, Q = W - columns.value(Q, slice(None)), Q.clone()
    for start in range(0, W.shape[1], block_size):
        block = slice(start, min(start + block_size, W.shape[1]))
        g, h = (R @ H[:, block]).T.contiguous(), H[block, block]
        for i, j in enumerate(range(start, block.stop)):
            Q[:, j] = columns.round(W[:, j] + g[i] / h[i, i] - R[:, j], j)
            change = W[:, j] - columns.value(Q[:, j], j) - R[:, j]
            R[:, j] += change
            g += h[:, i, None] * change
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
            return Tensor.float(U)
        damp *= 10
    raise QuantizeError(
        "the Hessian of the inputs is not positive definite: the calibration activations are not finite"
    )
