"""A quantized weight matrix is held as packed values with scales and zero points."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from quantize.errors import QuantizeError
from quantize.formats.base import get_format
from quantize.kernels.ops import dequantize
from quantize.scheme.scheme import WeightArgs

L2_ELEMENTS = 1 << 17  # weights that are worked on together, so that intermediate results stay in a core's cache
LAUNCH_ELEMENTS = 1 << 24  # the same on a GPU, where each operation on a few weights would wait for its launch


def cached_rows(W: Tensor) -> int:
    """Return the number of rows of a weight, or of rows as wide as its, that are worked on together."""
    return max(1, (LAUNCH_ELEMENTS if W.is_cuda else L2_ELEMENTS) // W.shape[1])


@dataclass(frozen=True)
class QTensor:
    """Packed values of a number format, with their scales and zero points.

    Invariants, for a weight W of shape [N, K] in G = K / group_size groups (G = 1 if group_size is 0):
        W ≈ (unpack() - zero_point) · unpack_scale(), where each group of columns has its own column of both
        data: int8 [N, K] for 6 and 8 bits, uint8 [N, ⌈K · b / 8⌉] for b ≤ 4 bits, as the format packs it
        scale: [N, G], in one of the format's `scale_dtypes`; > 0 when decoded, or just not 0 for symmetric integers
        zero_point: [N, G] in the format's `zero_point_dtype`, None if symmetric
        global_scale: float32 [] of NVFP4, or [N, 1] for experts, whose rows have that of their expert; None for others
    """

    data: Tensor
    scale: Tensor
    zero_point: Tensor | None
    columns: int
    args: WeightArgs
    global_scale: Tensor | None = None

    def check(self, name: str) -> None:
        """Check the invariants.

        Raises:
            QuantizeError: an invariant does not hold; the message says so of the weight `name`.
        """
        group, args, number_format = self.args.group_size or self.columns, self.args, get_format(self.args.format)
        stored = -(-self.columns * args.stored_bits // 8)
        scales = (len(self.data), self.columns // group) if self.data.dim() == 2 and len(self.data) else ()
        whole = () if self.global_scale is None or self.global_scale.dim() == 0 else (*scales[:1], 1)
        wanted: dict[str, tuple[Tensor | None, tuple[int, ...] | None, Set[torch.dtype]]] = {
            "integers": (self.data, (*scales[:1], stored), {torch.uint8 if args.stored_bits < 8 else torch.int8}),
            "scale": (self.scale, scales, number_format.scale_dtypes),
            "zero point": (self.zero_point, None if args.symmetric else scales, {number_format.zero_point_dtype}),
            "global scale": (self.global_scale, whole if number_format.has_global_scale else None, {torch.float32}),
        }
        for part, (tensor, shape, dtypes) in wanted.items():
            found = None if tensor is None else tuple(tensor.shape)
            if found != shape or (tensor is not None and tensor.dtype not in dtypes) or self.columns % group:
                raise QuantizeError(
                    f"the {part} of {name} are {found} of {tensor.dtype if tensor is not None else 'no type'}, which "
                    f"{args.num_bits}-bit weights of {self.columns} columns in groups of {group} do not have"
                )
        scale = self.unpack_scale()
        signed = number_format.scale_signs(scale, scale, self.args) is not None
        if not bool((((scale.abs() if signed else scale) > 0) & scale.isfinite()).all()):
            what = "finite and not 0" if signed else "positive and finite"
            raise QuantizeError(f"the scale of {name} is not {what} everywhere")

    @classmethod
    def pack(
        cls,
        values: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        args: WeightArgs,
        global_scale: Tensor | None = None,
    ) -> QTensor:
        """Pack values of the format, [N, K] in any dtype that holds them, with scales as they are stored."""
        number_format = get_format(args.format)
        zero_point = None if zero_point is None else zero_point.to(number_format.zero_point_dtype)
        data = number_format.pack(values, args)
        return cls(data, scale, zero_point, values.shape[1], args, global_scale)

    def unpack(self) -> Tensor:
        """Return values of the format [N, K], in int8 if they are integers."""
        return get_format(self.args.format).unpack(self.data, self.columns, self.args)

    def unpack_scale(self) -> Tensor:
        """Return the scale [N, G] in floating point, by which values are multiplied."""
        return get_format(self.args.format).decode_scale(self.scale, self.global_scale)

    def dequantize(self) -> Tensor:
        """Return the weight, float32 [N, K]."""
        return dequantize(self.unpack(), self.unpack_scale(), self.zero_point)

    def slice_rows(self, part: slice) -> QTensor:
        """Return some of the rows."""
        zero_point, global_scale = None if self.zero_point is None else self.zero_point[part], self.global_scale
        global_scale = global_scale if global_scale is None or global_scale.dim() == 0 else global_scale[part]
        return QTensor(self.data[part], self.scale[part], zero_point, self.columns, self.args, global_scale)

    def expert(self, number: int, count: int) -> QTensor:
        """Return the rows of one expert of some in one stack."""
        size = len(self.data) // count
        found = self.slice_rows(slice(number * size, (number + 1) * size))
        one = found.global_scale is None or found.global_scale.dim() == 0
        return found if one else replace(found, global_scale=found.global_scale[0, 0])  # type: ignore[index]

    def cat_rows(self, parts: Sequence[Mapping[str, Tensor]]) -> QTensor:
        """Join the `tensors` of parts of the rows to all rows, in the format of this one; parts keep global scales."""
        by_row = [{name: x.expand(len(p["qweight"]), 1) if x.dim() == 0 else x for name, x in p.items()} for p in parts]
        whole = {name: torch.cat([part[name] for part in by_row]) for name in by_row[0]}
        zero_point, global_scale = whole.get("zero_point"), whole.get("global_scale")
        return replace(
            self, data=whole["qweight"], scale=whole["scale"], zero_point=zero_point, global_scale=global_scale
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to save, by their suffixes."""
        named = {
            "qweight": self.data,
            "scale": self.scale,
            "zero_point": self.zero_point,
            "global_scale": self.global_scale,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass(frozen=True)
class CachedQTensor(QTensor):
    """A quantized weight that keeps its unpacked and dequantized values as long as it lives.

    Attributes:
        dtype: the dtype of the dequantized weight.
    """

    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, weight: QTensor, dtype: torch.dtype) -> Self:
        """Make a cached weight, for one that is used several times."""
        return cls(**vars(weight), dtype=dtype)

    def unpack(self) -> Tensor:
        """Return values of the format [N, K]."""
        return self._unpacked

    def dequantize(self) -> Tensor:
        """Return the weight [N, K]."""
        return self._weight

    @functools.cached_property
    def _unpacked(self) -> Tensor:
        return super().unpack()

    @functools.cached_property
    def _weight(self) -> Tensor:
        """The dequantized weight, made a few rows at a time, so that intermediate results stay in a core's cache."""
        values = torch.empty(len(self.data), self.columns, dtype=self.dtype, device=self.data.device)
        rows = cached_rows(values)
        for part, start in zip(values.split(rows), range(0, len(values), rows), strict=True):
            part.copy_(self.slice_rows(slice(start, start + rows)).dequantize())
        return values
