"""A quantizer rounds weights; all quantizers share the search for the grid."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from quantize.calibration.statistics import Gram
from quantize.formats import get_format
from quantize.formats.qtensor import QTensor, cached_rows
from quantize.scheme.registry import Registry
from quantize.scheme.scheme import Data, WeightArgs

QUANTIZERS = Registry("quantizer")


class Quantizer(Data):
    """A way to round one weight matrix; its fields are the recipe's parameters.

    Attributes:
        name: the name in recipes.
        needs_gram: whether `quantize` takes the Gram matrix of the layer's input.
        needs_float_reference: whether that matrix is of the rounded input, with its drift from the float model's input.
        mse: whether each scale is changed to the value that rounds the weights with the least error.
    """

    name: ClassVar[str]
    needs_gram: ClassVar[bool] = False
    needs_float_reference: ClassVar[bool] = False
    mse: bool = False

    @abstractmethod
    def quantize_weights(
        self,
        weights: Sequence[Tensor],
        args: WeightArgs,
        gram: Gram | None,
        scale_dtype: torch.dtype,
        product_dtype: torch.dtype = torch.float32,
    ) -> list[QTensor]:
        """Round weights that multiply the same input.

        Args:
            weights: matrices float32 [N, K], where K is a multiple of the group size.
            args: the bits, the symmetry and the group size.
            gram: the Gram matrix of the input, if `needs_gram`; it is overwritten.
            scale_dtype: the dtype to which scales are rounded before they are used.
            product_dtype: the dtype to which operands of large products are rounded.
        """

    def unrounded(self, weights: Sequence[Tensor], gram: Gram) -> Sequence[Tensor]:
        """Return the real weights that are rounded in place of some that multiply the same input.

        `gram` [K, K] is that of the input, with the drift, and it is overwritten.
        """
        del gram
        return weights

    def quantize(
        self,
        W: Tensor,
        args: WeightArgs,
        gram: Gram | None,
        scale_dtype: torch.dtype,
        product_dtype: torch.dtype = torch.float32,
    ) -> QTensor:
        """Round one W [N, K]; `gram` is not changed."""
        return self.quantize_weights([W], args, copy.deepcopy(gram), scale_dtype, product_dtype)[0]


def grouped(W: Tensor, args: WeightArgs) -> Tensor:
    """Reshape [N, K] to [N, G, K / G]."""
    return W.reshape(len(W), -1, args.group_size or W.shape[1])


def compute_qparams(
    W: Tensor,
    args: WeightArgs,
    scale_dtype: torch.dtype,
    mse: bool = False,
    importance: Tensor | None = None,
    global_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return scale and zero point [N, G] of each group of W [N, K].

    With `mse`, each range is multiplied by that factor of the format's `scale_search` that gives the least
    Σ importance · error², where importance [K] ≥ 0 is all ones if it is None. The format's `global_scale` is that of
    all weights that are rounded together.
    """
    weighting = grouped(torch.ones_like(W[:1]) if importance is None else importance[None], args)
    rows = cached_rows(W)
    found = [
        search_qparams(grouped(part, args), args, scale_dtype, global_scale, weighting if mse else None)
        for part in W.split(rows)
    ]
    scale, zero_point = (torch.cat(parts) for parts in zip(*found, strict=True))
    return scale, zero_point


def search_qparams(
    groups: Tensor, args: WeightArgs, dtype: torch.dtype, global_scale: Tensor | None, weighting: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return scale and zero point [n, G] of groups [n, G, K / G]; a weighting [1, G, K / G] asks for the least error.

    Without a zero point the search also tries what the format's `scale_signs` say.

    The search leaves a group once the weights outside its range alone have a larger error than the best range, because
    smaller ranges only add to that error.
    """
    number_format = get_format(args.format)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)  # ten times as fast as `aminmax`
    scale, zero_point = number_format.compute_qparams(low, high, args, dtype, global_scale)
    if weighting is None:
        return scale[..., 0], zero_point[..., 0]
    x, low, high, s, z, weighting = (
        t.flatten(0, 1) for t in (groups, low, high, scale, zero_point, weighting.expand_as(groups))
    )
    best, live, found = (
        quantization_error(x, s, z, args, weighting),
        torch.arange(len(x), device=x.device),
        torch.stack([s, z]),
    )
    ends, signs = number_format.clipping_range(args), number_format.scale_signs(low, high, args)
    if signs is not None:  # a scale below zero sees the range upside down
        low, high = torch.where(signs < 0, -high, low), torch.where(signs < 0, -low, high)
    for number, factor in enumerate(number_format.scale_search):
        tried = number_format.compute_qparams(low * factor, high * factor, args, dtype, global_scale)
        tried = tried if signs is None else (tried[0] * signs, tried[1])
        error = quantization_error(x, *tried, args, weighting)
        better = error < best
        best, s, z = (torch.where(better, *pair) for pair in ((error, best), (tried[0], s), (tried[1], z)))
        if number % 8 == 7 and ends is not None:
            open_ = (clipping_error_bound(x, *tried, ends, weighting) < best)[:, 0]
            found[:, live] = torch.stack([s, z])
            live, x, low, high, s, z, best, weighting = (t[open_] for t in (live, x, low, high, s, z, best, weighting))
            signs = None if signs is None else signs[open_]
    found[:, live] = torch.stack([s, z])
    found_scale, found_zero = found.view(2, *scale.shape[:-1])
    return found_scale, found_zero


def clipping_error_bound(
    x: Tensor, scale: Tensor, zero_point: Tensor, ends: tuple[float, float], weighting: Tensor
) -> Tensor:
    """Return Σ weighting · (distance from a format's `clipping_range`)² [n, 1], which only grows for smaller ranges."""
    t = x / scale + zero_point
    beyond = t - t.clamp(*ends)
    return beyond.square_().mul_(weighting).sum(-1, keepdim=True) * scale.square()


def quantization_error(x: Tensor, scale: Tensor, zero_point: Tensor, args: WeightArgs, weighting: Tensor) -> Tensor:
    """Return Σ weighting · (x - round(x))² [n, 1] of groups x [n, K / G]."""
    t = (x / scale).add_(zero_point)
    error = get_format(args.format).round(t, args).sub_(t)
    return error.square_().mul_(weighting).sum(-1, keepdim=True) * scale.square()


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, args: WeightArgs) -> Tensor:
    """Return the nearest values of the format, in the dtype of `x`."""
    return get_format(args.format).round(x / scale + zero_point, args)


def pack(
    values: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    args: WeightArgs,
    scale_dtype: torch.dtype,
    global_scale: Tensor | None,
) -> QTensor:
    """Pack values [N, K], which are on the grid that `compute_qparams` found."""
    number_format = get_format(args.format)
    stored = number_format.encode_scale(scale, global_scale, scale_dtype)
    own = None if global_scale is None else global_scale.clone()  # as files hold no tensor twice
    return QTensor.pack(values, stored, None if args.symmetric else zero_point, args, own)


def fake_quantize_weight(W: Tensor, args: WeightArgs) -> Tensor:
    """Round W [N, K] to nearest and dequantize it, as searches do to compare scales."""
    global_scale = get_format(args.format).global_scale([W])
    scale, zero_point = (grid[..., None] for grid in compute_qparams(W, args, W.dtype, global_scale=global_scale))
    return ((quantize(grouped(W, args), scale, zero_point, args) - zero_point) * scale).flatten(1)
