"""A quantized linear on a CPU multiplies in floating point, with a weight that is unpacked once and then held."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from quantize.formats import get_format
from quantize.formats.fake_quantize import fake_quantize
from quantize.formats.qtensor import CachedQTensor, QTensor, cached_rows
from quantize.kernels.ops import centred, fake_integers
from quantize.scheme.scheme import ActivationArgs

Result = TypeVar("Result")
FEW_ROWS = 16  # up to which one product of all groups is faster than a product for each


class FloatWeight(NamedTuple):
    """A quantized weight in floating point, N outputs by K = G · g columns in G groups.

    Attributes:
        values: the dequantized weight [N, K]; with a scale, the integers minus their zero points, [G, g, N].
        scale: float32 [G, 1, N]; None for a dequantized weight.
        args: how the activations are quantized that it multiplies.
    """

    values: Tensor
    scale: Tensor | None
    args: ActivationArgs | None


def runs_fake_quant(x: Tensor, args: ActivationArgs | None) -> bool:
    """Return whether `fake_quant_linear` multiplies activations x [..., K], quantized as `args` says.

    GPUs have kernels of their own. Runtime smooth sorts channels anew at each call, which only the reference does.
    """
    return x.device.type == "cpu" and not (args and args.runtime_smooth)


def holds_integers(args: ActivationArgs | None, dtype: torch.dtype) -> bool:
    """Return whether `hold_weight` keeps integers, so that products are the reference's, for inputs of this dtype."""
    return args is not None and get_format(args.format).element == "int" and dtype == torch.float32


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.inference_mode(False)
def hold_weight(weight: QTensor, args: ActivationArgs | None, dtype: torch.dtype) -> FloatWeight:
    """Unpack a weight for activations of this dtype, quantized as `args` says.

    Integers of float32 models stay integers, because a float product sums integers exactly, while a sum of dequantized
    values is rounded, and the least difference may move an activation of a later layer to the next integer.
    """
    if not holds_integers(args, dtype):
        return FloatWeight(CachedQTensor.of(weight, dtype).dequantize(), None, args)
    integers, scale = torch.empty(weight.columns, len(weight.data)), weight.scale.T
    rows = cached_rows(integers.T)
    for part, start in zip(integers.split(rows, 1), range(0, len(weight.data), rows), strict=True):
        some = weight.slice_rows(slice(start, start + rows))
        part.copy_(centred(some.unpack(), some.zero_point).T)
    return FloatWeight(integers.unflatten(0, (len(scale), -1)), scale.float().contiguous()[:, None], args)


def quantize_input(x: Tensor, args: ActivationArgs | None, integers: bool) -> tuple[Tensor, Tensor | None]:
    """Return activations as `fake_quant_linear` takes them.

    Args:
        x: floating point [..., K], behind the online transforms.
        args: how x is quantized; None leaves it in floating point.
        integers: whether the weight holds integers; then x becomes integers minus their zero points, with a scale.
    """
    if args is None or not integers:
        return fake_quantize(x, args), None
    return fake_integers(x, args.num_bits, args.symmetric, args.clip_ratio)


def fake_quant_linear(x: tuple[Tensor, Tensor | None], weight: FloatWeight, bias: Tensor | None) -> Tensor:
    """Compute what the reference computes, [..., K] → [..., N].

    With integers the result is the reference's to the bit: the same integers are summed group by group, without
    rounding as long as no sum reaches 2^24, and the same scales are applied in the same order.

    Args:
        x: the result of `quantize_input`, integers if the weight holds integers.
        weight: the result of `hold_weight`.
        bias: [N] or None.
    """
    q, scale = x
    if scale is None or weight.scale is None:
        return linear(q, weight.values, None if bias is None else bias.to(q))
    y = functools.reduce(Tensor.add_, group_products(q.flatten(0, -2), weight.values, weight.scale))
    y = y.view(*q.shape[:-1], weight.values.shape[-1]).mul_(scale)
    return y if bias is None else y.add_(bias)


def group_products(q: Tensor, values: Tensor, scale: Tensor) -> Iterator[Tensor]:
    """Yield for each group its product [M, N] with activations q [M, K], times the scale."""
    groups, columns, _ = values.shape
    if len(q) <= FEW_ROWS:
        products = torch.bmm(q.view(-1, groups, columns).transpose(0, 1), values).mul_(scale)
        yield from (products[group] for group in range(groups))
    else:
        for part, factor, some in zip(q.split(columns, 1), scale, values, strict=True):
            yield torch.mm(part, some).mul_(factor)


class LastInput:
    """The input that was quantized last, so that linears that read the same tensor in turn quantize it once.

    A tensor is known by its identity and by its version, which every change in place raises. It is not kept alive.
    """

    def __init__(self) -> None:
        self.last: tuple[weakref.ref[Tensor], int, Hashable, Any] | None = None

    def get(self, x: Tensor, key: Hashable, quantize: Callable[[], Result]) -> Result:
        """Return what `quantize` returns for x, whose result depends on x and on the key alone; None shares nothing."""
        if torch.compiler.is_compiling():  # a compiler sees by itself what is computed twice
            return quantize()
        if key is None or x.requires_grad or x.is_inference():  # these have a graph of their own, or no version
            return quantize()
        last = self.last
        if last and last[0]() is x and last[1:3] == (x._version, key):
            return last[3]  # type: ignore[no-any-return]
        found = quantize()
        self.last = weakref.ref(x, self.forget), x._version, key, found
        return found

    def forget(self, gone: weakref.ref[Tensor]) -> None:
        """Free the result for a tensor that is no more."""
        if self.last and self.last[0] is gone:
            self.last = None


LAST_INPUT = LastInput()
