"""What a quantizer is, and the grid every quantizer rounds to."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from quantize.calibration.statistics import Gram
from quantize.formats.qtensor import QTensor
from quantize.kernels.reference import round_to_grid, scale_and_zero_point
from quantize.registry import Registry
from quantize.scheme import Data, WeightArgs

QUANTIZERS = Registry("quantizer")


class Quantizer(Data):
    """A way to round one weight matrix; its fields are the recipe's parameters.

    Attributes:
        name: what recipes call it.
        needs_gram: `quantize` is given the Gram matrix of the layer's input.
        needs_exact: of its rounded input, and how that drifted from the float model's.
        mse: shrink each scale to the value that rounds the weights with the least error.
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

    With `mse`, each range is shrunk to the fraction in [0.2, 1], in steps of 1 %, that gives the least
    Σ importance · error², importance [K] ≥ 0 or ones.
    """
    groups, weighting = grouped(W, args), 1.0 if importance is None else grouped(importance[None], args)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale, zero_point = rounded_grid(low, high, args, scale_dtype)
    best = grid_error(groups, scale, zero_point, args, weighting)
    for shrink in torch.arange(0.99, 0.199, -0.01).tolist() if mse else ():
        s, z = rounded_grid(low * shrink, high * shrink, args, scale_dtype)
        error = grid_error(groups, s, z, args, weighting)
        better = error < best
        best, scale, zero_point = (torch.where(better, *pair) for pair in ((error, best), (s, scale), (z, zero_point)))
    return scale[..., 0], zero_point[..., 0]


def rounded_grid(low: Tensor, high: Tensor, args: WeightArgs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The grid of a range, its scale representable in `dtype`."""
    scale, zero_point = scale_and_zero_point(low, high, args.num_bits, args.symmetric)
    return scale.to(dtype).float(), zero_point


def grid_error(
    groups: Tensor, scale: Tensor, zero_point: Tensor, args: WeightArgs, weighting: Tensor | float
) -> Tensor:
    """Σ weighting · (w - round(w))² of each group, [N, G, 1]."""
    q = round_to_grid(groups, scale, zero_point, args.num_bits)
    return (weighting * ((q - zero_point) * scale - groups).square()).sum(-1, keepdim=True)


def fake_quantize_weight(W: Tensor, args: WeightArgs) -> Tensor:
    """W [N, K] rounded to nearest and back; what searches compare scales by."""
    scale, zero_point = find_grid(W, args, W.dtype)
    q = round_to_grid(grouped(W, args), scale[..., None], zero_point[..., None], args.num_bits)
    return ((q - zero_point[..., None]) * scale[..., None]).flatten(1)
