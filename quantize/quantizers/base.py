"""What a quantizer is, and the grid every quantizer rounds to."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from quantize.calibration.statistics import Gram
from quantize.formats.qtensor import QTensor
from quantize.kernels.fp4 import encode_scale, fp4_scale, nvfp4_unit, round_to_e2m1
from quantize.kernels.reference import round_to_grid, scale_and_zero_point
from quantize.registry import Registry
from quantize.scheme import Data, WeightArgs

QUANTIZERS = Registry("quantizer")
# What a range may shrink or grow to. An E8M0 scale only doubles or halves; an E4M3 scale 1.5 times as large puts 4, not
# 6, on the largest weight, which suits groups with many large ones, as the step from 4 to 6 is coarse.
RANGES = {
    "int": [percent / 100 for percent in range(99, 19, -1)],
    "mxfp4": [2.0, 0.5, 0.25],
    "nvfp4": [percent / 100 for percent in range(160, 39, -5)],
}


class Quantizer(Data):
    """A way to round one weight matrix; its fields are the recipe's parameters.

    Attributes:
        name: what recipes call it.
        needs_gram: `quantize` is given the Gram matrix of the layer's input.
        needs_exact: of its rounded input, and how that drifted from the float model's.
        mse: change each scale to the value that rounds the weights with the least error.
    """

    name: ClassVar[str]
    needs_gram: ClassVar[bool] = False
    needs_exact: ClassVar[bool] = False
    mse: bool = False

    @abstractmethod
    def quantize(self, W: Tensor, args: WeightArgs, gram: Gram | None, scale_dtype: torch.dtype) -> QTensor:
        """Round W [N, K].

        Args:
            W: float32 [N, K]; K a multiple of the group size.
            args: bits, symmetry, group size.
            gram: of the inputs, if `needs_gram`.
            scale_dtype: scales are rounded to it before anything is rounded with them.
        """


def grouped(W: Tensor, args: WeightArgs) -> Tensor:
    """[N, K] → [N, G, K / G]."""
    return W.reshape(len(W), -1, args.group_size or W.shape[1])


def find_grid(
    W: Tensor, args: WeightArgs, scale_dtype: torch.dtype, mse: bool = False, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point [N, G] of each group of W [N, K].

    With `mse`, each range is scaled by the one of `RANGES` that gives the least Σ importance · error², importance
    [K] ≥ 0 or ones.
    """
    groups, weighting = grouped(W, args), 1.0 if importance is None else grouped(importance[None], args)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    unit = find_unit(W, args)
    scale, zero_point = rounded_grid(low, high, args, scale_dtype, unit)
    best = grid_error(groups, scale, zero_point, args, weighting)
    for factor in RANGES[args.format] if mse else ():
        s, z = rounded_grid(low * factor, high * factor, args, scale_dtype, unit)
        error = grid_error(groups, s, z, args, weighting)
        better = error < best
        best, scale, zero_point = (torch.where(better, *pair) for pair in ((error, best), (s, scale), (z, zero_point)))
    return scale[..., 0], zero_point[..., 0]


def find_unit(W: Tensor, args: WeightArgs) -> Tensor | None:
    """float32 []: NVFP4's scale of a whole tensor; None for other formats."""
    return nvfp4_unit(W.abs().max()) if args.format == "nvfp4" else None


def rounded_grid(
    low: Tensor, high: Tensor, args: WeightArgs, dtype: torch.dtype, unit: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The grid of a range, its scale representable in `dtype`, or in the byte that FP4 stores."""
    if args.format != "int":
        scale = fp4_scale(torch.maximum(-low, high), unit)
        return scale, torch.zeros_like(scale)
    scale, zero_point = scale_and_zero_point(low, high, args.num_bits, args.symmetric)
    return scale.to(dtype).float(), zero_point


def grid_error(
    groups: Tensor, scale: Tensor, zero_point: Tensor, args: WeightArgs, weighting: Tensor | float
) -> Tensor:
    """Σ weighting · (w - round(w))² of each group, [N, G, 1]."""
    q = nearest(groups, scale, zero_point, args)
    return (weighting * ((q - zero_point) * scale - groups).square()).sum(-1, keepdim=True)


def nearest(x: Tensor, scale: Tensor, zero_point: Tensor, args: WeightArgs) -> Tensor:
    """The nearest integers of the grid, in the dtype of `x`; of FP4 twice the nearest E2M1 values."""
    return round_to_grid(x, scale, zero_point, args.num_bits) if args.format == "int" else round_to_e2m1(x / scale)


def pack(
    W: Tensor, q: Tensor, scale: Tensor, zero_point: Tensor, args: WeightArgs, scale_dtype: torch.dtype
) -> QTensor:
    """Integers q [N, K] of W, on the grid that `find_grid` found for W, as they are stored."""
    if args.format == "int":
        return QTensor.pack(q, scale.to(scale_dtype), None if args.symmetric else zero_point, args)
    unit = find_unit(W, args)
    return QTensor.pack(q, encode_scale(scale, unit), None, args, unit)


def fake_quantize_weight(W: Tensor, args: WeightArgs) -> Tensor:
    """W [N, K] rounded to nearest and back; what searches compare scales by."""
    scale, zero_point = (grid[..., None] for grid in find_grid(W, args, W.dtype))
    return ((nearest(grouped(W, args), scale, zero_point, args) - zero_point) * scale).flatten(1)
