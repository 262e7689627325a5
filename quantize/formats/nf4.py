"""NF4 has quantiles of the normal distribution as values, which Gaussian weights take equally often."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from quantize.formats.base import FORMATS
from quantize.formats.codebook import CodeBook


@FORMATS.register("nf4")
class NF4(CodeBook):
    """The code book of Dettmers et al. 2023, arXiv 2305.14314, section 3 and appendix E; scales are not quantized."""

    defaults: ClassVar[Mapping[str, object]] = {"group_size": 64}  # the paper's blocks
    levels: ClassVar[tuple[float, ...]] = (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    )  # fmt: skip
