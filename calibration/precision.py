"""The precision of the matrix products that calibration and rounding take: by far most of what they compute."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.backends import mkldnn

matmul = mkldnn.matmul  # type: ignore[attr-defined]


def bfloat16_unit() -> str:
    """What multiplies bfloat16 faster than float32 here: `amx`, `avx512_bf16` or `none`; sums depend on it."""
    if torch.cpu._is_amx_tile_supported():
        return "amx"
    return "avx512_bf16" if torch.cpu._is_avx512_bf16_supported() else "none"


def multiplies_bfloat16() -> bool:
    """Whether the processor has a unit for products of bfloat16."""
    return bfloat16_unit() != "none"


def calibrates_in_bfloat16(stored: Iterable[torch.dtype]) -> bool:
    """Whether parameters are all stored in bfloat16, and so meant to run in it, and the processor is faster at that."""
    return set(stored) == {torch.bfloat16} and multiplies_bfloat16()


@contextlib.contextmanager
def bfloat16_products(wanted: bool) -> Iterator[None]:
    """Products may round their operands to bfloat16, if that is wanted, and sum in float32.

    AMX rounds those of float32 matrices; AVX-512 leaves them, and is as fast only where `product_dtype` is given.
    """
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16" if wanted else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def unrounded_products() -> contextlib.AbstractContextManager[None]:
    """Products leave operands in float32, whatever `product_dtype` says; AVX-512 by oneDNN, on AMD faster than MKL."""
    return bfloat16_products(bfloat16_unit() == "avx512_bf16")


def product_dtype() -> torch.dtype:
    """What operands of products are rounded to; it pays to do so once with one that several products take."""
    return torch.bfloat16 if matmul.fp32_precision == "bf16" else torch.float32


def factor_dtype() -> torch.dtype:
    """The same of those whose product is summed in float32: AMX rounds them itself, and sums as it multiplies."""
    return torch.float32 if bfloat16_unit() == "amx" else product_dtype()


def plus_product(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Base + left @ right, float32; of a `right` in bfloat16 the product is rounded to it as well."""
    if right.dtype == torch.float32:
        return torch.addmm(base, left, right)
    return base + left.to(right.dtype) @ right
