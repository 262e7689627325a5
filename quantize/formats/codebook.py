"""A code book has up to 16 values of any kind, each with a 4-bit code."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from quantize.formats.base import NumberFormat
from quantize.kernels.ops import pack_int4, unpack_int4
from quantize.scheme.scheme import WeightArgs

CODES = 16
SLACK = 1 + 1 / 64  # rounding a scale to any dtype moves a level by less


class CodeBook(NumberFormat):
    """The value of code i is `levels[i]`. A weight takes the nearest value, and the lower one of two equally near ones.

    Attributes:
        levels: ascending values, the first below 0 and the last above. If they are integers, with `value_dtype` int8,
            the format may have an `activation_format`.
    """

    element: ClassVar[Literal["level"]] = "level"
    levels: ClassVar[tuple[float, ...]]
    value_dtype: ClassVar[torch.dtype] = torch.float32
    # The nearest level takes ten times as long to find as the nearest integer, so the search takes
    # steps of 4 %. Steps of 1 % would make the error 1 % smaller.
    scale_search: ClassVar[tuple[float, ...]] = tuple(percent / 100 for percent in range(96, 19, -4))
    table: ClassVar[Tensor]  # of the values of all 16 codes; only damaged files have codes without a level
    _midpoints: ClassVar[Tensor]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        filled = cls.levels + cls.levels[-1:] * (CODES - len(cls.levels))
        cls.table = torch.tensor(filled, dtype=cls.value_dtype)
        cls._midpoints = torch.tensor([(a + b) / 2 for a, b in pairwise(cls.levels)])
        cls.step = min(b - a for a, b in pairwise(cls.levels))

    def compute_qparams(
        self, low: Tensor, high: Tensor, args: WeightArgs, scale_dtype: torch.dtype, global_scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the least scale at which the levels span the range, or 1 for a range of zero width."""
        del args, global_scale
        scale = torch.maximum(low / self.levels[0], high / self.levels[-1])
        scale = torch.where(scale > torch.finfo(scale.dtype).tiny, scale, torch.ones_like(scale))
        return scale.to(scale_dtype).float(), torch.zeros_like(scale)

    def scale_signs(self, low: Tensor, high: Tensor, args: WeightArgs) -> Tensor | None:
        """Return the signs by which the longer side of each range gets the longer side of the levels, if one is."""
        del args
        lowest, highest = self.levels[0], self.levels[-1]
        return None if lowest == -highest else torch.where((high > -low) == (highest < -lowest), -1.0, 1.0)

    def round(self, t: Tensor, args: WeightArgs, out: Tensor | None = None) -> Tensor:
        """Return the nearest levels; values outside the levels saturate."""
        del args
        nearest = torch.bucketize(t.contiguous(), self._midpoints.to(t), out_int32=True)
        values = self.table.to(t)[nearest]
        return values if out is None else out.copy_(values)

    def clipping_range(self, args: WeightArgs) -> tuple[float, float] | None:
        """Return the outermost levels, with some slack."""
        del args
        return self.levels[0] * SLACK, self.levels[-1] * SLACK

    def pack(self, values: Tensor, args: WeightArgs) -> Tensor:
        """Pack the codes of the values."""
        del args
        levels = self.table[: len(self.levels)].to(values.device)
        return pack_int4(torch.bucketize(values.to(levels.dtype).contiguous(), levels).to(torch.int8))

    def unpack(self, data: Tensor, columns: int, args: WeightArgs) -> Tensor:
        """Return the levels of packed codes."""
        del args
        return self.table.to(data.device)[(unpack_int4(data, columns) & (CODES - 1)).int()]
