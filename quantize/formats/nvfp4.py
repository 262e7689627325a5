"""NVFP4 has E2M1 values, 16 of which share an E4M3 scale, and one float32 scale for matrices that share an input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from quantize.formats.base import FORMATS
from quantize.formats.fp4 import FP4
from quantize.kernels.ops import nvfp4_global_scale


@FORMATS.register("nvfp4")
class NVFP4(FP4):
    """The format as in Egiazarian et al. 2025, arXiv 2509.23202."""

    activation_format: ClassVar[str | None] = "nvfp4"
    group_size: ClassVar[int | None] = 16
    has_global_scale: ClassVar[bool] = True
    scale_dtypes: ClassVar[frozenset[torch.dtype]] = frozenset({torch.float8_e4m3fn})
    # A scale 1.5 times as large puts the largest weight at 4, not 6. This suits groups with many large weights, because
    # the step from 4 to 6 is coarse.
    scale_search: ClassVar[tuple[float, ...]] = tuple(percent / 100 for percent in range(160, 39, -5))
    rotation_block: ClassVar[int | None] = None  # groups of 16 already follow outliers

    def global_scale(self, weights: Sequence[Tensor]) -> Tensor | None:
        """Return the scale with which the largest magnitude reaches the top of both E4M3 and E2M1."""
        return nvfp4_global_scale(torch.stack([W.abs().max() for W in weights]).max())
