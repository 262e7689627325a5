"""Both FP4 formats have E2M1 values, held as integers (`kernels/fp4.py`), and scales of one byte."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from quantize.formats.base import NumberFormat
from quantize.kernels import fp4
from quantize.scheme.scheme import WeightArgs


class FP4(NumberFormat):
    """The values are twice an E2M1 value: ±{0, 1, 2, 3, 4, 6, 8, 12}."""

    element: ClassVar[Literal["e2m1"]] = "e2m1"

    def compute_qparams(
        self, low: Tensor, high: Tensor, args: WeightArgs, scale_dtype: torch.dtype, global_scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return a scale that fits in one byte, for any dtype of the model."""
        del args, scale_dtype
        scale = fp4.fp4_scale(torch.maximum(-low, high), global_scale)
        return scale, torch.zeros_like(scale)

    def round(self, t: Tensor, args: WeightArgs, out: Tensor | None = None) -> Tensor:
        """Round ties to the even mantissa; values outside the range saturate."""
        del args
        return fp4.round_to_e2m1(t) if out is None else out.copy_(fp4.round_to_e2m1(t))

    def pack(self, values: Tensor, args: WeightArgs) -> Tensor:
        """Pack the codes, which consist of sign and magnitude."""
        del args
        return fp4.pack_fp4(values.to(torch.int8))

    def unpack(self, data: Tensor, columns: int, args: WeightArgs) -> Tensor:
        """Return int8, with 0 for the code of -0."""
        del args
        return fp4.unpack_fp4(data, columns)

    def encode_scale(self, scale: Tensor, global_scale: Tensor | None, scale_dtype: torch.dtype) -> Tensor:
        """Encode a scale in one byte, without loss."""
        del scale_dtype
        return fp4.encode_scale(scale, global_scale)

    def decode_scale(self, stored: Tensor, global_scale: Tensor | None) -> Tensor:
        """Return float32."""
        return fp4.decode_scale(stored, global_scale)
