"""dINT4 has integers and half a step on either side of zero, so that fewer small weights become zero."""

from __future__ import annotations

from typing import ClassVar

import torch

from quantize.formats.base import FORMATS
from quantize.formats.codebook import CodeBook


@FORMATS.register("dint4")
class DInt4(CodeBook):
    """The denormal integers of AQAS, arXiv 2311.05161, in half steps: 0, ±½ and ±1 to ±6, 15 levels.

    The paper's own table is not public; this is its "balanced" range, and `dint4_full` the other reading.
    """

    activation_format: ClassVar[str | None] = "int"
    value_dtype: ClassVar[torch.dtype] = torch.int8
    levels: ClassVar[tuple[float, ...]] = (-12, -10, -8, -6, -4, -2, -1, 0, 1, 2, 4, 6, 8, 10, 12)


@FORMATS.register("dint4_full")
class FullDInt4(DInt4):
    """The same with -7 for the code that is left, and scales of either sign."""

    scale_search: ClassVar[tuple[float, ...]] = (1.0, *CodeBook.scale_search)  # 1 for the other sign
    levels: ClassVar[tuple[float, ...]] = (-14, *DInt4.levels)
