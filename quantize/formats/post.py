"""POST has powers of the square root of two as values, on either side of zero."""

from __future__ import annotations

from typing import ClassVar

from quantize.formats.base import FORMATS
from quantize.formats.codebook import CodeBook

SIZES = tuple(2 ** (-k / 2) for k in range(6, -1, -1))


@FORMATS.register("post")
class Post(CodeBook):
    """The power-of-square-root-of-two levels of ASQ, arXiv 2504.17263: 0 and ±2^(-k/2) for k = 0 to 6.

    The code of the paper has plain powers of two and 17 levels, one more than 4 bits hold; this is what the paper says.
    """

    levels: ClassVar[tuple[float, ...]] = (*(-size for size in reversed(SIZES)), 0.0, *SIZES)
