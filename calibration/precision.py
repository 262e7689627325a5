"""The precision of the operands of the largest matrix products while a model is calibrated and rounded."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def bfloat16_unit() -> str:
    """Name the unit that multiplies bfloat16 faster than float32: `amx`, `avx512_bf16` or `none`. Sums depend on it."""
    if torch.cpu._is_amx_tile_supported():
        return "amx"
    return "avx512_bf16" if torch.cpu._is_avx512_bf16_supported() else "none"


def calibration_dtype(stored: Iterable[torch.dtype], device: torch.device) -> torch.dtype:
    """Return what operands are rounded to: bfloat16 if all parameters are stored in it and the device has a unit.

    A model stored in bfloat16 is meant to run in it. All other models are calibrated in float32.
    """
    suits = set(stored) == {torch.bfloat16} and (device.type == "cuda" or bfloat16_unit() != "none")
    return torch.bfloat16 if suits else torch.float32


def plus_product(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return base + left @ right, float32; if `right` is in bfloat16, the product is rounded to bfloat16, too."""
    if right.dtype == torch.float32:
        return torch.addmm(base, left, right)
    return base + left.to(right.dtype) @ right
