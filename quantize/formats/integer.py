"""The integer format has the values of 3, 4, 6 or 8 bits in two's complement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from quantize.formats.base import FORMATS, NumberFormat
from quantize.kernels.ops import pack_bits, unpack_bits
from quantize.kernels.reference import integer_range, scale_and_zero_point
from quantize.scheme.scheme import WeightArgs

SIGNED_BITS = 4  # the most bits of symmetric integers whose scales may be negative
FLOAT16_BITS = 11  # significant bits of a float16
SMALLEST_FLOAT16, LARGEST_FLOAT16 = 2.0**-24, 2.0**12  # 15 of the latter are a float16, too


@FORMATS.register("int")
class Integer(NumberFormat):
    """Integers of 3, 4, 6 or 8 bits, with or without a zero point."""

    element: ClassVar[Literal["int", "level"]] = "int"
    activation_format: ClassVar[str | None] = "int"
    needs: ClassVar[Mapping[str, object]] = {}

    def compute_qparams(
        self, low: Tensor, high: Tensor, args: WeightArgs, scale_dtype: torch.dtype, global_scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return scale and zero point; without a zero point the range reaches ±(2^(b-1) - 1)."""
        del global_scale
        scale, zero_point = scale_and_zero_point(low, high, args.num_bits, args.symmetric)
        if args.scale_dtype is not None:
            scale = float16_scale(scale, FLOAT16_BITS - (0 if args.symmetric else args.num_bits))
        return scale.to(scale_dtype).float(), zero_point

    def scale_signs(self, low: Tensor, high: Tensor, args: WeightArgs) -> Tensor | None:
        """Return the signs by which the longer side of each range gets the one value that it has more, -2^(b-1).

        They are for few bits without a zero point, where that value is a good part of the range.
        """
        if not args.symmetric or args.num_bits > SIGNED_BITS:
            return None
        return torch.where(high > -low, -1.0, 1.0)

    def round(self, t: Tensor, args: WeightArgs, out: Tensor | None = None) -> Tensor:
        """Round halves to even; values outside the range saturate."""
        return torch.round(t, out=out).clamp_(*integer_range(args.num_bits))

    def clipping_range(self, args: WeightArgs) -> tuple[float, float] | None:
        """Return the integers' range; with slack, because the zero point is rounded as well."""
        smallest, largest = integer_range(args.num_bits)
        slack = 0.1 if args.symmetric else 1.1
        return smallest - slack, largest + slack

    def pack(self, values: Tensor, args: WeightArgs) -> Tensor:
        """Pack in two's complement."""
        q = values.to(torch.int8)
        return pack_bits(q, args.num_bits) if args.stored_bits < 8 else q.contiguous()

    def unpack(self, data: Tensor, columns: int, args: WeightArgs) -> Tensor:
        """Return int8."""
        return unpack_bits(data, columns, args.num_bits) if args.stored_bits < 8 else data


def float16_scale(scale: Tensor, bits: int) -> Tensor:
    """Return scales > 0 of any shape, rounded to `bits` significant bits that float16 holds; float32.

    A product with an integer of 11 - `bits` bits is then a float16, too. Scales beyond float16 take its ends.
    """
    mantissa, exponent = torch.frexp(scale.float())
    rounded = torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)
    return rounded.clamp(SMALLEST_FLOAT16, LARGEST_FLOAT16).half().float()
