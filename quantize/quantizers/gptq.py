"""GPTQ rounds column by column, and the columns to come compensate each error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from quantize.calibration.statistics import Gram
from quantize.errors import QuantizeError
from quantize.formats import get_format
from quantize.formats.qtensor import QTensor, cached_rows
from quantize.quantizers.base import QUANTIZERS, Quantizer, compute_qparams, pack
from quantize.quantizers.column_rounding import OrderedColumns, gptq_round, sweep
from quantize.quantizers.hessian import factor, fill_upper, panels, permute
from quantize.scheme.scheme import WeightArgs

ENOUGH_ROWS = 2  # rows of inputs for each column, below which they say little of most directions


@QUANTIZERS.register("gptq")
class GPTQ(Quantizer):
    """Algorithm 1 of Frantar et al. 2022, arXiv 2210.17323, with activation order; grids are fixed beforehand.

    Attributes:
        mse: whether scales are first fitted to the least rounding error, weighted by the root mean square of each
            input.
        damp: the part of the mean diagonal that is added to the Hessian; more, if it is of few rows: K / rows below
            `ENOUGH_ROWS` rows for each of K columns, as a linear behind a pooling sees them, which then shrinks it
            towards a multiple of the identity (Ledoit and Wolf 2004).
        act_order: whether columns are taken by falling diagonal of the Hessian.
        block_size: the number of columns between two updates of all the columns to come.
        sweeps: the number of rounds of coordinate descent afterwards, which may move a column again
            (QuantEase, Behdin et al. 2023, arXiv 2309.01885, algorithm 1).
    """

    needs_gram: ClassVar[bool] = True
    mse: bool = True
    damp: float = Field(0.01, gt=0)
    act_order: bool = True
    block_size: int = Field(128, ge=1)
    sweeps: int = Field(2, ge=0)

    def quantize_weights(
        self,
        weights: Sequence[Tensor],
        args: WeightArgs,
        gram: Gram | None,
        scale_dtype: torch.dtype,
        product_dtype: torch.dtype = torch.float32,
    ) -> list[QTensor]:
        """Round each W [N, K] to the least error of W X, where `gram` has seen the inputs X; `gram` is overwritten."""
        gram, H = require_gram(gram)
        device, energy = weights[0].device, H.diagonal().clone()
        importance, dead = energy.to(device).sqrt(), energy.to(device) == 0
        H.diagonal()[energy == 0] = 1
        order = H.diagonal().argsort(descending=True, stable=True) if self.act_order else torch.arange(len(H))
        permute(H, order.to(H.device))
        order = order.to(device)
        weights = self.target_weights(weights, gram, H, factor(H, self.damping(gram), device), order)
        whole = get_format(args.format).global_scale(weights)
        grids = [compute_qparams(W, args, scale_dtype, self.mse, importance, whole) for W in weights]
        scale, zero = (torch.cat(parts).T.contiguous() for parts in zip(*grids, strict=True))
        group = order // (args.group_size or len(H))
        columns = OrderedColumns(scale, None if args.symmetric else zero, group, args)
        R = torch.empty(len(H), scale.shape[1], device=device)
        for part, W in zip(R.split([len(W) for W in weights], dim=1), weights, strict=True):
            for rows in panels(len(W), cached_rows(W)):
                part[:, rows] = W[rows].T[order]
        R[dead[order]] = 0
        Q = self.round_and_sweep(R, H, columns, product_dtype)
        parts = Q[order.argsort()].T.split([len(W) for W in weights])
        return [pack(q, *grid, args, scale_dtype, whole) for q, grid in zip(parts, grids, strict=True)]

    def damping(self, gram: Gram) -> float:
        """Return the part of the mean diagonal that is added to a Gram matrix [K, K]."""
        _, H = require_gram(gram)
        return max(self.damp, len(H) / gram.rows) if gram.rows < ENOUGH_ROWS * len(H) else self.damp

    def unrounded(self, weights: Sequence[Tensor], gram: Gram) -> Sequence[Tensor]:
        """Return what `target_weights` says of each W [N, K]."""
        gram, H = require_gram(gram)
        H.diagonal()[H.diagonal() == 0] = 1
        d = factor(H, self.damping(gram), weights[0].device)
        return self.target_weights(weights, gram, H, d, torch.arange(len(H), device=weights[0].device))

    def target_weights(
        self, weights: Sequence[Tensor], gram: Gram, H: Tensor, d: Tensor, order: Tensor
    ) -> Sequence[Tensor]:
        """Return what is rounded in place of the weights; `factor` has changed H [K, K], which has another order."""
        del gram, H, d, order
        return weights

    def round_and_sweep(self, R: Tensor, H: Tensor, columns: OrderedColumns, product_dtype: torch.dtype) -> Tensor:
        """Return values of the format [K, N] for R [K, N]; R and the factored H are overwritten."""
        Q = gptq_round(R, H, columns, self.block_size, product_dtype)
        if self.sweeps:
            fill_upper(H)
        for _ in range(self.sweeps):
            sweep(Q, R, H, columns, self.block_size, product_dtype)
        return Q


def require_gram(gram: Gram | None) -> tuple[Gram, Tensor]:
    """Return a Gram matrix and its value [K, K], whose scale does not matter.

    Raises:
        QuantizeError: the Gram matrix is missing or has seen nothing.
    """
    if gram is None or gram.value is None or not gram.rows:
        raise QuantizeError(
            "GPTQ needs calibration data, and none reached this layer; leave it out with --ignore, "
            'or round without data (quantizer = { name = "rtn" })'
        )
    return gram, gram.value
