"""A quantized weight matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.kernels.ops import dequantize, pack_int4, unpack_int4
from quantize.scheme import WeightArgs


@dataclass(frozen=True)
class QTensor:
    """Packed integers with their scales and zero points.

    Invariants, for a weight W of shape [N, K] in G = K / group_size groups (G = 1 if group_size is 0):
        W ≈ (unpack() - zero_point) · scale, each group of columns with its own column of `scale` and `zero_point`
        data: int8 [N, K] at 8 bits, uint8 [N, ⌈K/2⌉] at 4 bits (`kernels/packing.py`)
        scale: [N, G] floating point, > 0;  zero_point: int8 [N, G], None if symmetric
    """

    data: Tensor
    scale: Tensor
    zero_point: Tensor | None
    columns: int
    args: WeightArgs

    @classmethod
    def pack(cls, q: Tensor, scale: Tensor, zero_point: Tensor | None, args: WeightArgs) -> QTensor:
        """From integers [N, K] in any dtype, within the range of `args.num_bits`."""
        q = q.to(torch.int8)
        data = pack_int4(q) if args.num_bits == 4 else q.contiguous()
        return cls(data, scale, None if zero_point is None else zero_point.to(torch.int8), q.shape[1], args)

    def unpack(self) -> Tensor:
        """int8 [N, K]."""
        return unpack_int4(self.data, self.columns) if self.args.num_bits == 4 else self.data

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        return dequantize(self.unpack(), self.scale, self.zero_point)

    def tensors(self) -> dict[str, Tensor]:
        """What is saved, by the suffix it is saved under."""
        named = {"qweight": self.data, "scale": self.scale, "zero_point": self.zero_point}
        return {name: tensor for name, tensor in named.items() if tensor is not None}
