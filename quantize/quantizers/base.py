"""What a quantizer is, and the grid every quantizer rounds to."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from quantize.calibration.statistics import Gram
from quantize.formats.qtensor import QTensor, cached_rows
from quantize.kernels.fp4 import encode_scale, fp4_scale, nvfp4_global_scale, round_to_e2m1
from quantize.kernels.reference import integer_range, scale_and_zero_point
from quantize.recipe.registry import Registry
from quantize.recipe.scheme import Data, WeightArgs

QUANTIZERS = Registry("quantizer")
# What a range may shrink or grow to. An E8M0 scale only doubles or halves; an E4M3 scale 1.5 times as large puts 4, not
# 6, on the largest weight, which suits groups with many large ones, as the step from 4 to 6 is coarse.
SCALE_SEARCH = {
    "int": [percent / 100 for percent in range(99, 19, -1)],
    "mxfp4": [2.0, 0.5, 0.25],
    "nvfp4": [percent / 100 for percent in range(160, 39, -5)],
}


class Quantizer(Data):
    """A way to round one weight matrix; its fields are the recipe's parameters.

    Attributes:
        name: what recipes call it.
        needs_gram: `quantize` is given the Gram matrix of the layer's input.
        needs_float_reference: of its rounded input, and how that drifted from the float model's.
        mse: change each scale to the value that rounds the weights with the least error.
    """

    name: ClassVar[str]
    needs_gram: ClassVar[bool] = False
    needs_float_reference: ClassVar[bool] = False
    mse: bool = False

    @abstractmethod
    def quantize_group(
        self, weights: Sequence[Tensor], args: WeightArgs, gram: Gram | None, scale_dtype: torch.dtype
    ) -> list[QTensor]:
        """Round weights that multiply the same input.

        Args:
            weights: float32 [N, K] each; K a multiple of the group size.
            args: bits, symmetry, group size.
            gram: of the input, if `needs_gram`; used up.
            scale_dtype: scales are rounded to it before anything is rounded with them.
        """

    def quantize(self, W: Tensor, args: WeightArgs, gram: Gram | None, scale_dtype: torch.dtype) -> QTensor:
        """Round one W [N, K]; `gram` stays as it is."""
        return self.quantize_group([W], args, copy.deepcopy(gram), scale_dtype)[0]


def grouped(W: Tensor, args: WeightArgs) -> Tensor:
    """[N, K] → [N, G, K / G]."""
    return W.reshape(len(W), -1, args.group_size or W.shape[1])


def compute_qparams(
    W: Tensor, args: WeightArgs, scale_dtype: torch.dtype, mse: bool = False, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point [N, G] of each group of W [N, K].

    With `mse`, each range is scaled by the one of `SCALE_SEARCH` that gives the least Σ importance · error², importance
    [K] ≥ 0 or ones.
    """
    global_scale, weighting = (
        find_global_scale(W, args),
        grouped(torch.ones_like(W[:1]) if importance is None else importance[None], args),
    )
    rows = cached_rows(W.shape[1])
    found = [
        search_qparams(grouped(part, args), args, scale_dtype, global_scale, weighting if mse else None)
        for part in W.split(rows)
    ]
    scale, zero_point = (torch.cat(parts) for parts in zip(*found, strict=True))
    return scale, zero_point


def search_qparams(
    groups: Tensor, args: WeightArgs, dtype: torch.dtype, global_scale: Tensor | None, weighting: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point [n, G] of groups [n, G, K / G]; with a weighting [1, G, K / G] those of the least error.

    A group is left once what lies outside its range makes a larger error already: smaller ranges only add to that.
    """
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale, zero_point = qparams_from_range(low, high, args, dtype, global_scale)
    if weighting is None:
        return scale[..., 0], zero_point[..., 0]
    x, low, high, s, z, weighting = (
        t.flatten(0, 1) for t in (groups, low, high, scale, zero_point, weighting.expand_as(groups))
    )
    best, live, found = quantization_error(x, s, z, args, weighting), torch.arange(len(x)), torch.stack([s, z])
    for number, factor in enumerate(SCALE_SEARCH[args.format]):
        tried = qparams_from_range(low * factor, high * factor, args, dtype, global_scale)
        error = quantization_error(x, *tried, args, weighting)
        better = error < best
        best, s, z = (torch.where(better, *pair) for pair in ((error, best), (tried[0], s), (tried[1], z)))
        if number % 8 == 7 and args.format == "int":
            open_ = (clipping_error_bound(x, *tried, args, weighting) < best)[:, 0]
            found[:, live] = torch.stack([s, z])
            live, x, low, high, s, z, best, weighting = (t[open_] for t in (live, x, low, high, s, z, best, weighting))
    found[:, live] = torch.stack([s, z])
    found_scale, found_zero = found.view(2, *scale.shape[:-1])
    return found_scale, found_zero


def clipping_error_bound(x: Tensor, scale: Tensor, zero_point: Tensor, args: WeightArgs, weighting: Tensor) -> Tensor:
    """Σ weighting · (distance from a grid's ends)² [n, 1], which no smaller range reaches beyond.

    The ends of a smaller range lie further out by what rounding shifts them at most: its scale, and its zero point.
    """
    qmin, qmax = integer_range(args.num_bits)
    slack, t = 0.1 if args.symmetric else 1.1, x / scale + zero_point
    beyond = t - t.clamp(qmin - slack, qmax + slack)
    return beyond.square_().mul_(weighting).sum(-1, keepdim=True) * scale.square()


def find_global_scale(W: Tensor, args: WeightArgs) -> Tensor | None:
    """float32 []: NVFP4's scale of a whole tensor; None for other formats."""
    return nvfp4_global_scale(W.abs().max()) if args.format == "nvfp4" else None


def qparams_from_range(
    low: Tensor, high: Tensor, args: WeightArgs, dtype: torch.dtype, global_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The grid of a range, its scale representable in `dtype`, or in the byte that FP4 stores."""
    if args.format != "int":
        scale = fp4_scale(torch.maximum(-low, high), global_scale)
        return scale, torch.zeros_like(scale)
    scale, zero_point = scale_and_zero_point(low, high, args.num_bits, args.symmetric)
    return scale.to(dtype).float(), zero_point


def quantization_error(x: Tensor, scale: Tensor, zero_point: Tensor, args: WeightArgs, weighting: Tensor) -> Tensor:
    """Σ weighting · (x - round(x))² [n, 1] of groups x [n, K / G], counted in steps of the grid."""
    t = (x / scale).add_(zero_point)
    return round_to_grid(t, args).sub_(t).square_().mul_(weighting).sum(-1, keepdim=True) * scale.square()


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, args: WeightArgs) -> Tensor:
    """The nearest integers of the grid, in the dtype of `x`; of FP4 twice the nearest E2M1 values."""
    return round_to_grid(x / scale + zero_point, args)


def round_to_grid(t: Tensor, args: WeightArgs, out: Tensor | None = None) -> Tensor:
    """The nearest integers of the grid to t = x / scale + zero point; written to `out`, if that is given."""
    if args.format == "int":
        return torch.round(t, out=out).clamp_(*integer_range(args.num_bits))
    return round_to_e2m1(t) if out is None else out.copy_(round_to_e2m1(t))


def pack(
    W: Tensor, q: Tensor, scale: Tensor, zero_point: Tensor, args: WeightArgs, scale_dtype: torch.dtype
) -> QTensor:
    """Integers q [N, K] of W, on the grid that `compute_qparams` found for W, as they are stored."""
    if args.format == "int":
        return QTensor.pack(q, scale.to(scale_dtype), None if args.symmetric else zero_point, args)
    global_scale = find_global_scale(W, args)
    return QTensor.pack(q, encode_scale(scale, global_scale), None, args, global_scale)


def fake_quantize_weight(W: Tensor, args: WeightArgs) -> Tensor:
    """W [N, K] rounded to nearest and back; what searches compare scales by."""
    scale, zero_point = (grid[..., None] for grid in compute_qparams(W, args, W.dtype))
    return ((quantize(grouped(W, args), scale, zero_point, args) - zero_point) * scale).flatten(1)
