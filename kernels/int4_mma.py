"""W4A4 on the int4 tensor cores of sm_80, sm_86 and sm_89, which Triton cannot name.

The kernel multiplies packed bytes as if they were int8, and one mnemonic of its PTX is rewritten: `mma.m16n8k64.s4` has
the very fragments of `mma.m16n8k32.s8` with two columns in each byte (PTX ISA, 9.7.14, matrix fragments), and a product
does not depend on the order of columns, as long as weights and activations agree. Nothing is unpacked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from quantize.kernels.config import Config
from quantize.kernels.gemm import channel_arguments
from quantize.kernels.packed import LOW_OFFSET, PackedWeight, QuantizedActivations, halves, pad_columns
from quantize.kernels.tiles import correction, rows_of, store_scaled, tile_of

ARCHITECTURES = frozenset({"sm_80", "sm_86", "sm_87", "sm_89"})  # later ones emulate s4 with s8
INT8 = re.compile(r"mma\.sync\.aligned\.m16n8k32\.row\.col\.(satfinite\.)?s32\.s8\.s8\.s32")
INT4 = r"mma.sync.aligned.m16n8k64.row.col.\1s32.s4.s4.s32"
KERNEL = "int4_mma_kernel"


@triton.jit
def product(w: tl.tensor, a: tl.tensor, acc: tl.tensor, NATIVE: tl.constexpr) -> Any:
    """Both nibbles of w [N, bytes] times those of a [bytes, M], plus acc: a product of bytes that `rewrite` changes."""
    if NATIVE:
        return tl.dot(w, a, acc, out_dtype=tl.int32)
    acc = tl.dot((w << 4) >> 4, (a << 4) >> 4, acc, out_dtype=tl.int32)
    return tl.dot(w >> 4, a >> 4, acc, out_dtype=tl.int32)


@triton.jit
def int4_mma_kernel(
    y: tl.tensor, w: tl.tensor, a: tl.tensor, w_scale: tl.tensor, zero_w: tl.tensor, w_sum: tl.tensor,
    high_sum: tl.tensor, a_scale: tl.tensor, zero_a: tl.tensor, a_sum: tl.tensor, low_sum: tl.tensor, bias: tl.tensor,
    M: tl.tensor, N: tl.tensor, row_bytes: tl.tensor, stride: tl.tensor,
    NATIVE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPAN: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of Y [M, N] a program; two products in an iteration, or sm_80 would hold one byte in a register."""
    m, n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    w, a = rows_of(w, a, n, m, N, M, stride, stride)
    span = tl.arange(0, SPAN)
    acc = correction(n, m, M, N, zero_w, w_sum, high_sum, zero_a, a_sum, low_sum, "native")
    for start in range(0, row_bytes, 2 * SPAN):
        for part in tl.static_range(2):
            first = start + part * SPAN
            left = row_bytes - first
            w_bytes = tl.load(w + (first + span)[None, :], mask=span[None, :] < left, other=0)
            a_bytes = tl.load(a + (first + span)[:, None], mask=span[:, None] < left, other=0)
            acc = product(w_bytes, a_bytes, acc, NATIVE)
    store_scaled(acc, y, m, n, M, N, w_scale, a_scale, bias)


def rewrite(ptx: str) -> str:
    """PTX of the kernel with int4 products in place of int8 ones; any other as it is.

    Raises:
        RuntimeError: the kernel multiplies otherwise than it should.
    """
    if f".entry {KERNEL}(" not in ptx:
        return ptx
    rewritten, count = INT8.subn(INT4, ptx)
    if not count:
        raise RuntimeError(f"{KERNEL} holds no mma.m16n8k32.s8; native int4 products are for {sorted(ARCHITECTURES)}")
    return rewritten


@contextmanager
def int4_products() -> Iterator[None]:
    """Within, Triton compiles the kernel with native int4 products."""

    def hook(_: Any = None, stages: Any = None, *__: Any) -> tuple[str, str] | None:  # Triton calls it in two ways
        if stages is None:
            return KERNEL, KERNEL  # what tells these compiled kernels from others
        make_ptx: Callable[..., str] = stages["ptx"]
        stages["ptx"] = lambda source, metadata: rewrite(make_ptx(source, metadata))
        return None

    with knobs.runtime.scope():
        knobs.runtime.add_stages_inspection_hook = hook
        yield


def as_signed(pw: PackedWeight) -> PackedWeight:
    """Weights of the layout `w4` with both nibbles in two's complement, the layout `s4`."""
    return replace(pw, data=pw.data ^ LOW_OFFSET, layout="s4")


def pack_signed(q: Tensor) -> Tensor:
    """int8 [M, K] in [-8, 7] → int8 [M, K' / 2], the layout `s4`."""
    low, high = halves(pad_columns(q))
    return ((high << 4) | (low & 15)).flatten(-2)


def launch(
    qa: QuantizedActivations, pw: PackedWeight, bias: Tensor | None, out_dtype: torch.dtype, config: Config
) -> Tensor:
    """Y [M, N] = X Wᵀ + bias in `out_dtype`, as `gemm.launch`, from operands in the layout `s4`.

    Args:
        qa: activations, for asymmetric weights with one sum a token.
        pw: one scale a channel.
        bias: [N] or None.
        out_dtype: float16, bfloat16 or float32.
        config: of the variant `native`; with `asm` on int4 tensor cores, else unpacked, as the interpreter needs it.

    Raises:
        ValueError: operands in another layout.
        RuntimeError: natively, on a GPU without int4 tensor cores.
    """
    if (pw.layout, qa.layout) != ("s4", "s4") or pw.data.shape[1] != qa.q.shape[1]:
        raise ValueError(f"int4 products are of operands in s4, not in {pw.layout} and {qa.layout}")
    (M, row_bytes), N = qa.q.shape, pw.data.shape[0]
    y = torch.empty((M, N), dtype=out_dtype, device=qa.q.device)
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    if tiles:
        with int4_products() if config.asm else nullcontext():
            int4_mma_kernel[(tiles,)](
                y, *channel_arguments(qa, pw, bias), M, N, row_bytes, row_bytes,
                NATIVE=config.asm, BLOCK_M=config.block_m, BLOCK_N=config.block_n, SPAN=config.block_k // 4,
                **config.options(),
            )  # fmt: skip
    return y
