"""The precision of matrix products, which are by far most of what calibration and rounding compute."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.backends import mkldnn

matmul = mkldnn.matmul  # type: ignore[attr-defined]


def bfloat16_unit() -> str:
    """Name the unit that multiplies bfloat16 faster than float32: `amx`, `avx512_bf16` or `none`. Sums depend on it."""
    if torch.cpu._is_amx_tile_supported():
        return "amx"
    return "avx512_bf16" if torch.cpu._is_avx512_bf16_supported() else "none"


def multiplies_bfloat16() -> bool:
    """Return whether the processor has a unit for products of bfloat16."""
    return bfloat16_unit() != "none"


def calibrates_in_bfloat16(stored: Iterable[torch.dtype]) -> bool:
    """Return whether all parameters are stored in bfloat16, and so meant to run in it, and the processor has a unit."""
    return set(stored) == {torch.bfloat16} and multiplies_bfloat16()


@contextlib.contextmanager
def bfloat16_products(wanted: bool) -> Iterator[None]:
    """Let products in the `with` block round their operands to bfloat16, if `wanted`, and sum in float32.

    AMX rounds the operands of float32 products by itself. AVX-512 does not, and is faster only if the operands are
    given in `product_dtype`.
    """
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16" if wanted else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def unrounded_products() -> contextlib.AbstractContextManager[None]:
    """Let products in the `with` block keep operands in float32; on AVX-512 by oneDNN, on AMD faster than MKL."""
    return bfloat16_products(bfloat16_unit() == "avx512_bf16")


def product_dtype() -> torch.dtype:
    """Return the dtype that operands of products are rounded to; round an operand of several products only once."""
    return torch.bfloat16 if matmul.fp32_precision == "bf16" else torch.float32


def factor_dtype() -> torch.dtype:
    """Return the dtype of operands whose product is summed in float32, which AMX rounds by itself as it multiplies."""
    return torch.float32 if bfloat16_unit() == "amx" else product_dtype()


def plus_product(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return base + left @ right, float32; if `right` is in bfloat16, the product is rounded to bfloat16, too."""
    if right.dtype == torch.float32:
        return torch.addmm(base, left, right)
    return base + left.to(right.dtype) @ right
