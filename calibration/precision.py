"""The precision of the matrix products that calibration and rounding take: by far most of what they compute."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.backends import mkldnn

matmul = mkldnn.matmul  # type: ignore[attr-defined]


def multiplies_bfloat16() -> bool:
    """Whether the processor multiplies matrices of bfloat16 in units of their own (AMX)."""
    return bool(torch.cpu._is_amx_tile_supported())


def calibrates_in_bfloat16(stored: Iterable[torch.dtype]) -> bool:
    """Whether parameters are all stored in bfloat16, and so meant to run in it, and the processor is faster at that."""
    return set(stored) == {torch.bfloat16} and multiplies_bfloat16()


@contextlib.contextmanager
def bfloat16_products(wanted: bool) -> Iterator[None]:
    """Products of float32 matrices round their operands to bfloat16, if that is wanted, and sum in float32."""
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16" if wanted else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def product_dtype() -> torch.dtype:
    """What operands of products are rounded to; it pays to do so once with one that several products take."""
    return torch.bfloat16 if matmul.fp32_precision == "bf16" else torch.float32


def plus_product(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Base + left @ right, float32; of a `right` in bfloat16 the product is rounded to it as well."""
    if right.dtype == torch.float32:
        return torch.addmm(base, left, right)
    return base + left.to(right.dtype) @ right
