"""IQ4_NL has 16 levels in 8 bits that are denser around zero, as weights are; zero is none of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from quantize.formats.base import FORMATS
from quantize.formats.codebook import CodeBook
from quantize.formats.integer import SMALLEST_FLOAT16
from quantize.scheme.scheme import WeightArgs

LARGEST = torch.finfo(torch.float16).max


@FORMATS.register("iq4_nl")
class IQ4_NL(CodeBook):  # noqa: N801
    """GGUF's IQ4_NL, `kvalues_iq4nl` in `ggml-common.h` of llama.cpp; scales of either sign are float16."""

    defaults: ClassVar[Mapping[str, object]] = {"group_size": 32}
    activation_format: ClassVar[str | None] = "int"
    value_dtype: ClassVar[torch.dtype] = torch.int8
    levels: ClassVar[tuple[float, ...]] = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
    scale_search: ClassVar[tuple[float, ...]] = (1.0, *CodeBook.scale_search)  # 1 for the other sign
    float16_scales: ClassVar[bool] = True
    scale_dtypes: ClassVar[frozenset[torch.dtype]] = frozenset({torch.float16, torch.bfloat16, torch.float32})

    def compute_qparams(
        self, low: Tensor, high: Tensor, args: WeightArgs, scale_dtype: torch.dtype, global_scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the least scale at which the levels span the range; the least float16 for a range of zero width."""
        del scale_dtype
        scale, zero_point = super().compute_qparams(low, high, args, torch.float32, global_scale)
        scale = torch.where(high > low, scale, torch.maximum(low.abs(), high.abs()) / self.levels[-1])
        return scale.clamp(SMALLEST_FLOAT16, LARGEST).half().float(), zero_point
