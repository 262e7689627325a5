"""Round-to-nearest needs no data."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from quantize.calibration.statistics import Gram
from quantize.formats import get_format
from quantize.formats.qtensor import QTensor, cached_rows
from quantize.quantizers.base import QUANTIZERS, Quantizer, compute_qparams, grouped, pack, quantize
from quantize.scheme.scheme import WeightArgs


@QUANTIZERS.register("rtn")
class RoundToNearest(Quantizer):
    """Rounds each weight to the nearest point of its group's grid."""

    def quantize_weights(
        self,
        weights: Sequence[Tensor],
        args: WeightArgs,
        gram: Gram | None,
        scale_dtype: torch.dtype,
        product_dtype: torch.dtype = torch.float32,
    ) -> list[QTensor]:
        """Round each W [N, K]."""
        del gram, product_dtype
        global_scale = get_format(args.format).global_scale(weights)
        return [self.rounded(W, args, scale_dtype, global_scale) for W in weights]

    def rounded(self, W: Tensor, args: WeightArgs, scale_dtype: torch.dtype, global_scale: Tensor | None) -> QTensor:
        """Round a few rows at a time, so that intermediate results are small and stay in a core's cache."""
        scale, zero_point = compute_qparams(W, args, scale_dtype, self.mse, global_scale=global_scale)
        q = torch.empty_like(W, dtype=get_format(args.format).value_dtype)
        rows = len(W) if W.is_meta else cached_rows(W)
        for part, w, s, z in zip(*(t.split(rows) for t in (q, W, scale, zero_point)), strict=True):
            part.copy_(quantize(grouped(w, args), s[..., None], z[..., None], args).flatten(1))
        return pack(q, scale, zero_point, args, scale_dtype, global_scale)


@functools.lru_cache
def quantize_on_meta(shape: torch.Size, dtype: torch.dtype, args: WeightArgs, experts: int | None = None) -> QTensor:
    """Quantize a weight, or each expert of a stack, on the meta device; blocks are alike, so each shape just once."""
    rows = shape[0] // (experts or 1)
    one = RoundToNearest().quantize(torch.empty(rows, *shape[1:], device="meta"), args, None, dtype)
    return one if experts is None else one.cat_rows([one.tensors()] * experts)
