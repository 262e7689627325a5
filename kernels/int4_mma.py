"""W4A4 runs on the int4 tensor cores of sm_80, sm_86 and sm_89, for which Triton has no operation.

The kernel multiplies packed bytes as if they were int8, and then one mnemonic of its PTX is rewritten. The fragments of
`mma.m16n8k64.s4` are those of `mma.m16n8k32.s8` with two columns in each byte (PTX ISA, 9.7.14, matrix fragments). A
product does not depend on the order of columns, as long as weights and activations agree, so nothing is unpacked.
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

ARCHITECTURES = frozenset({"sm_80", "sm_86", "sm_87", "sm_89"})  # later architectures emulate s4 by s8
INT8 = re.compile(r"mma\.sync\.aligned\.m16n8k32\.row\.col\.(satfinite\.)?s32\.s8\.s8\.s32")
INT4 = r"mma.sync.aligned.m16n8k64.row.col.\1s32.s4.s4.s32"
KERNEL = "int4_mma_kernel"


@triton.jit
def product(w: tl.tensor, a: tl.tensor, acc: tl.tensor, NATIVE: tl.constexpr) -> Any:
    """Multiply both nibbles of w [N, bytes] by those of a [bytes, M], plus acc; `rewrite` changes the byte product."""
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
    """A program computes one tile of Y [M, N]; with one product a step, sm_80 would hold one byte in a register."""
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
    """Return the kernel's PTX with int4 products in place of int8 products; other PTX stays as it is.

    Raises:
        RuntimeError: the kernel does not multiply by the expected instruction.
    """
    if f".entry {KERNEL}(" not in ptx:
        return ptx
    rewritten, count = INT8.subn(INT4, ptx)
    if not count:
        raise RuntimeError(f"{KERNEL} holds no mma.m16n8k32.s8; native int4 products are for {sorted(ARCHITECTURES)}")
    return rewritten


@contextmanager
def int4_products() -> Iterator[None]:
    """Make Triton compile the kernel with native int4 products, within the context."""

    def hook(_: Any = None, stages: Any = None, *__: Any) -> tuple[str, str] | None:  # Triton calls it in two ways
        if stages is None:
            return KERNEL, KERNEL  # tells these compiled kernels from others
        make_ptx: Callable[..., str] = stages["ptx"]
        stages["ptx"] = lambda source, metadata: rewrite(make_ptx(source, metadata))
        return None

    with knobs.runtime.scope():
        knobs.runtime.add_stages_inspection_hook = hook
        yield


def as_signed(pw: PackedWeight) -> PackedWeight:
    """Turn weights of the layout `w4` into the layout `s4`, with both nibbles in two's complement."""
    return replace(pw, data=pw.data ^ LOW_OFFSET, layout="s4")


def pack_signed(q: Tensor) -> Tensor:
    """Pack int8 [M, K] in [-8, 7] into int8 [M, K' / 2] of the layout `s4`."""
    low, high = halves(pad_columns(q))
    return ((high << 4) | (low & 15)).flatten(-2)


def launch(
    qa: QuantizedActivations, pw: PackedWeight, bias: Tensor | None, out_dtype: torch.dtype, config: Config
) -> Tensor:
    """Compute Y [M, N] = X Wᵀ + bias in `out_dtype`, as `gemm.launch`, from operands in the layout `s4`.

    Args:
        qa: the activations; for asymmetric weights they need one sum for each token.
        pw: weights with one scale for each channel.
        bias: [N] or None.
        out_dtype: float16, bfloat16 or float32.
        config: a configuration of the variant `native`; with `asm` it runs on int4 tensor cores, and without it nibbles
            are unpacked, as the interpreter needs it.

    Raises:
        ValueError: the operands have another layout.
        RuntimeError: `asm` is set, and the GPU has no int4 tensor cores.
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
