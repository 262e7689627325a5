"""The GEMM kernels share the order of tiles, nibbles as operands, the sum over K, and the store of the result.

The weights are the left operand, Cᵀ = W Aᵀ, so that on tensor cores of every kind each weight is unpacked once.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

# Four bytes are in a register. Plain shifts of int8 tensors would be taken apart into bytes.
SHIFT_ASM = tl.constexpr(
    "{ .reg .b32 t; shl.b32 t, $2, 4; lop3.b32 $0, t, 0xF0F0F0F0, 0x80808080, 0x6A; and.b32 $1, $2, 0xF0F0F0F0; }"
)
MASK_ASM = tl.constexpr("and.b32 $0, $2, 0x0F0F0F0F; and.b32 $1, $2, 0xF0F0F0F0;")
PAIR_ASM = tl.constexpr("and.b32 $0, $2, 0x0F0F0F0F; mov.b32 $1, $2;")
ROWS_OF_TILES = tl.constexpr(8)  # token tiles that share a column of weight tiles in L2


@triton.jit
def tile_of(program: tl.tensor, M: tl.tensor, N: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr) -> Any:
    """Return tokens m [BLOCK_M] and channels n [BLOCK_N] of a program's tile; neighbours read the same weights."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band = program // (ROWS_OF_TILES * tiles_n)
    rows = tl.minimum(tiles_m - band * ROWS_OF_TILES, ROWS_OF_TILES)
    within = program % (ROWS_OF_TILES * tiles_n)
    tile_m, tile_n = band * ROWS_OF_TILES + within % rows, within // rows
    return tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def rows_of(
    w: tl.tensor, a: tl.tensor, n: tl.tensor, m: tl.tensor, N: tl.tensor, M: tl.tensor,
    w_stride: tl.tensor, a_stride: tl.tensor,
) -> Any:  # fmt: skip
    """Return pointers to the rows n of weights [BLOCK_N, 1] and m of activations [1, BLOCK_M]; strides are in bytes.

    Rows beyond the last wrap around to the first, which needs no mask; their results are not written.
    """
    return w + (n % N).to(tl.int64)[:, None] * w_stride, a + (m % M).to(tl.int64)[None, :] * a_stride


@triton.jit
def nibbles(packed: tl.tensor, VARIANT: tl.constexpr, ASM: tl.constexpr) -> Any:
    """Return the low and the high nibbles of packed weights as int8 operands.

    `shift`: 16 · w for both.  `mask`: w + 8, and 16 · w.  `pair`: w + 8, and the whole byte (`packed.py`).
    """
    if ASM:
        code: tl.constexpr = SHIFT_ASM if VARIANT == "shift" else (MASK_ASM if VARIANT == "mask" else PAIR_ASM)
        low, high = tl.inline_asm_elementwise(
            code, "=&r,=r,r", [packed], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    elif VARIANT == "shift":
        low, high = (packed << 4) ^ -128, packed & -16
    elif VARIANT == "mask":
        low, high = packed & 15, packed & -16
    else:
        low, high = packed & 15, packed
    return low, high


@triton.jit
def columns_of(step: tl.tensor, SPAN: tl.constexpr) -> Any:
    """Return the columns, int32 [SPAN], of low nibbles of packed bytes from step · SPAN on; high ones are at + 64."""
    byte = step * SPAN + tl.arange(0, SPAN)
    return byte + byte // 64 * 64


@triton.jit
def operands(
    w: tl.tensor, a: tl.tensor, step: tl.tensor, SPAN: tl.constexpr, VARIANT: tl.constexpr, ASM: tl.constexpr
) -> Any:
    """Load weights [BLOCK_N, SPAN] and activations [SPAN, BLOCK_M] of low nibbles, then those of high ones, int8.

    Args:
        w: pointers to rows of weights, [BLOCK_N, 1].
        a: pointers to rows of activations, [1, BLOCK_M].
        step: the number of spans of packed bytes before this one.
    """
    columns = columns_of(step, SPAN)
    if VARIANT == "bytes":
        low, high = tl.load(w + columns[None, :]), tl.load(w + (columns + 64)[None, :])
    else:
        low, high = nibbles(tl.load(w + step * SPAN + tl.arange(0, SPAN)[None, :]), VARIANT, ASM)
    return low, tl.load(a + columns[:, None]), high, tl.load(a + (columns + 64)[:, None])


@triton.jit
def accumulate(
    acc: tl.tensor, w: tl.tensor, a: tl.tensor, start: tl.tensor, stop: tl.tensor,
    SPAN: tl.constexpr, VARIANT: tl.constexpr, ASM: tl.constexpr,
) -> Any:  # fmt: skip
    """Return `acc` + Σ w · a over the steps start to stop, int32; `mask` and `pair` have w + 8 for low nibbles.

    No int8 tensor is carried from one iteration to the next, and each iteration has two products; otherwise compilers
    for sm_80 would hold one byte in a register. |acc| must stay below 2^27.

    Args:
        acc: int32 [BLOCK_N, BLOCK_M].
        w: pointers to rows of weights, [BLOCK_N, 1].
        a: pointers to rows of activations, [1, BLOCK_M].
    """
    scaled = tl.zeros_like(acc) if VARIANT == "mask" else (acc if VARIANT == "bytes" else acc * 16)
    for step in range(start, stop):
        w_low, a_low, w_high, a_high = operands(w, a, step, SPAN, VARIANT, ASM)
        scaled = tl.dot(w_high, a_high, scaled, out_dtype=tl.int32)
        if VARIANT == "mask":
            acc = tl.dot(w_low, a_low, acc, out_dtype=tl.int32)
        else:
            scaled = tl.dot(w_low, a_low, scaled, out_dtype=tl.int32)
    if VARIANT == "bytes":
        return scaled
    return acc + (scaled >> 4) if VARIANT == "mask" else scaled >> 4


@triton.jit
def correction(
    n: tl.tensor, m: tl.tensor, M: tl.tensor, N: tl.tensor,
    zero_w: tl.tensor, w_sum: tl.tensor, high_sum: tl.tensor, zero_a: tl.tensor, a_sum: tl.tensor, low_sum: tl.tensor,
    VARIANT: tl.constexpr,
) -> Any:  # fmt: skip
    """Return where `accumulate` starts, int32, to give Σ (q_w - zero_w)(q_a - zero_a) for channels n and tokens m."""
    in_n, in_m = n < N, m < M
    of_token = tl.load(zero_a + m, mask=in_m, other=0)[None, :]
    total = -tl.load(w_sum + n, mask=in_n, other=0)[:, None] * of_token
    if VARIANT == "pair":
        total += 7 * tl.load(high_sum + n, mask=in_n, other=0)[:, None]
    if VARIANT == "pair" or VARIANT == "mask":
        total -= 8 * tl.load(low_sum + m, mask=in_m, other=0)[None, :]
    if zero_w is not None:
        total -= tl.load(zero_w + n, mask=in_n, other=0)[:, None] * tl.load(a_sum + m, mask=in_m, other=0)[None, :]
    return total


@triton.jit
def store_scaled(
    total: tl.tensor, y: tl.tensor, m: tl.tensor, n: tl.tensor, M: tl.tensor, N: tl.tensor,
    w_scale: tl.tensor, a_scale: tl.tensor, bias: tl.tensor,
) -> None:  # fmt: skip
    """Store Yᵀ = total · w_scale · a_scale + bias for the channels n and tokens m that exist."""
    in_n, in_m = n < N, m < M
    total = total.to(tl.float32) * tl.load(w_scale + n, mask=in_n, other=0.0)[:, None]
    total = total * tl.load(a_scale + m, mask=in_m, other=0.0)[None, :]
    if bias is not None:
        total += tl.load(bias + n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    address = y + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(address, total.to(y.dtype.element_ty), mask=in_n[:, None] & in_m[None, :])
