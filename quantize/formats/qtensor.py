"""A quantized weight matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.kernels.ops import decode_scale, dequantize, pack_fp4, pack_int4, unpack_fp4, unpack_int4
from quantize.scheme import WeightArgs


@dataclass(frozen=True)
class QTensor:
    """Packed integers, or E2M1 codes, with their scales and zero points.

    Invariants, for a weight W of shape [N, K] in G = K / group_size groups (G = 1 if group_size is 0):
        W ≈ (unpack() - zero_point) · unpack_scale(), each group of columns with its own column of both
        data: int8 [N, K] at 6 and 8 bits, uint8 [N, ⌈K/2⌉] at 4 bits (`kernels/packing.py`, `kernels/fp4.py`)
        scale: [N, G], > 0: floating point for integers, uint8 exponents for MXFP4, float8_e4m3fn for NVFP4
        zero_point: int8 [N, G], None if symmetric;  unit: float32 [] of NVFP4, None for others
    """

    data: Tensor
    scale: Tensor
    zero_point: Tensor | None
    columns: int
    args: WeightArgs
    unit: Tensor | None = None

    @classmethod
    def pack(
        cls, q: Tensor, scale: Tensor, zero_point: Tensor | None, args: WeightArgs, unit: Tensor | None = None
    ) -> QTensor:
        """From integers [N, K] in any dtype, within the range of `args.num_bits`, and scales as they are stored."""
        q = q.to(torch.int8)
        pack = pack_int4 if args.format == "int" else pack_fp4
        data = pack(q) if args.num_bits == 4 else q.contiguous()
        return cls(data, scale, None if zero_point is None else zero_point.to(torch.int8), q.shape[1], args, unit)

    def unpack(self) -> Tensor:
        """int8 [N, K]."""
        unpack = unpack_int4 if self.args.format == "int" else unpack_fp4
        return unpack(self.data, self.columns) if self.args.num_bits == 4 else self.data

    def unpack_scale(self) -> Tensor:
        """[N, G] floating point: what one integer stands for."""
        return self.scale if self.args.format == "int" else decode_scale(self.scale, self.unit)

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        return dequantize(self.unpack(), self.unpack_scale(), self.zero_point)

    def tensors(self) -> dict[str, Tensor]:
        """What is saved, by the suffix it is saved under."""
        named = {"qweight": self.data, "scale": self.scale, "zero_point": self.zero_point, "unit": self.unit}
        return {name: tensor for name, tensor in named.items() if tensor is not None}
