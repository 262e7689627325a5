"""Q4_1 has 16 equally spaced levels from the least to the largest weight of a group, of which none need be zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from quantize.formats.base import FORMATS
from quantize.formats.integer import SMALLEST_FLOAT16, Integer
from quantize.kernels.reference import integer_range
from quantize.scheme.scheme import WeightArgs

LARGEST = torch.finfo(torch.float16).max


@FORMATS.register("q4_1")
class Q4_1(Integer):  # noqa: N801
    """GGUF's Q4_1: 4-bit integers whose zero point is a float16, as their scale is.

    Its files have the minimum m of each group in the place of the zero point: w = d · (q + 8) + m, so that m is
    -d · (zero point + 8). Source: `ggml-quants.c` of llama.cpp, `quantize_row_q4_1_ref`.
    """

    element: ClassVar[Literal["int", "level"]] = "level"  # no kernel for integers takes such zero points
    activation_format: ClassVar[str | None] = None
    needs: ClassVar[Mapping[str, object]] = {"num_bits": 4, "symmetric": False}
    defaults: ClassVar[Mapping[str, object]] = {"group_size": 32}
    zero_point_dtype: ClassVar[torch.dtype] = torch.float16
    float16_scales: ClassVar[bool] = True
    scale_dtypes: ClassVar[frozenset[torch.dtype]] = frozenset({torch.float16, torch.bfloat16, torch.float32})

    def compute_qparams(
        self, low: Tensor, high: Tensor, args: WeightArgs, scale_dtype: torch.dtype, global_scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the scale and the zero point whose levels span the range, zero among them or not."""
        del args, global_scale, scale_dtype
        least, largest = integer_range(4)
        scale = (high - low) / (largest - least)
        scale = torch.where(scale > 0, scale, torch.maximum(low.abs(), high.abs()))  # of equal weights
        scale = torch.where(scale > 0, scale, 1.0).clamp(SMALLEST_FLOAT16, LARGEST).half().float()
        return scale, (least - low / scale).clamp(-LARGEST, LARGEST).half().float()
