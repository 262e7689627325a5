"""The integer format has the values of 4, 6 or 8 bits in two's complement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from quantize.formats.base import FORMATS, NumberFormat
from quantize.kernels.ops import pack_int4, unpack_int4
from quantize.kernels.reference import integer_range, scale_and_zero_point
from quantize.scheme.scheme import WeightArgs


@FORMATS.register("int")
class Integer(NumberFormat):
    """Integers of 4, 6 or 8 bits, with or without a zero point."""

    element: ClassVar[Literal["int"]] = "int"
    activation_format: ClassVar[str | None] = "int"
    needs: ClassVar[Mapping[str, object]] = {}

    def compute_qparams(
        self, low: Tensor, high: Tensor, args: WeightArgs, scale_dtype: torch.dtype, global_scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return scale and zero point; without a zero point the range reaches ±(2^(b-1) - 1)."""
        del global_scale
        scale, zero_point = scale_and_zero_point(low, high, args.num_bits, args.symmetric)
        return scale.to(scale_dtype).float(), zero_point

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
        return pack_int4(q) if args.num_bits == 4 else q.contiguous()

    def unpack(self, data: Tensor, columns: int, args: WeightArgs) -> Tensor:
        """Return int8."""
        return unpack_int4(data, columns) if args.num_bits == 4 else data
