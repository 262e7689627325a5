"""MXFP4 has E2M1 values, 32 of which share a power of two as their scale."""

from __future__ import annotations

from typing import ClassVar

import torch

from quantize.formats.base import FORMATS
from quantize.formats.fp4 import FP4


@FORMATS.register("mxfp4")
class MXFP4(FP4):
    """The format of the OCP Microscaling Formats specification 1.0."""

    activation_format: ClassVar[str | None] = "mxfp4"
    group_size: ClassVar[int | None] = 32
    scale_dtypes: ClassVar[frozenset[torch.dtype]] = frozenset({torch.uint8})
    scale_search: ClassVar[tuple[float, ...]] = (2.0, 0.5, 0.25)  # an E8M0 scale only doubles or halves
    rotation_block: ClassVar[int | None] = 32  # the channels that share a scale (MR-GPTQ, arXiv 2509.23202, section 4)
