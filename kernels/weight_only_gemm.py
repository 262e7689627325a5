"""The product of activations in floating point and packed weights, which are unpacked on their way to the dot product.

Weights lie as they are stored (`packing.py`), so that they are held once. Integers minus their zero points are exact in
float16 and bfloat16, and each group's sum is taken in float32 before its scale is applied. The 4-bit codes of a code
book are looked up in a table.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantize.kernels.config import Config, step_of
from quantize.kernels.epilogue import store_output
from quantize.kernels.split_k import part_of
from quantize.kernels.tiles import tile_of

DEQUANTIZED_ROWS = 64  # of the tile that a program writes


@triton.jit
def stored_integers(
    w: tl.tensor, n: tl.tensor, step: tl.tensor, N: tl.tensor, w_stride: tl.tensor, BITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> Any:  # fmt: skip
    """Load int8 [BLOCK_N, BLOCK_K], the integers of channels n in the columns of a step."""
    BYTES: tl.constexpr = BLOCK_K * BITS // 8
    byte = step * BYTES + tl.arange(0, BYTES)
    inside = (n < N)[:, None] & (byte < w_stride)[None, :]
    packed = tl.load(w + n.to(tl.int64)[:, None] * w_stride + byte[None, :], mask=inside, other=0)
    if BITS == 8:
        return packed
    else:
        low, high = (packed << 4).to(tl.int8, bitcast=True) >> 4, packed.to(tl.int8, bitcast=True) >> 4
        return tl.interleave(low, high)


@triton.jit
def halves(words: tl.tensor, SHIFT: tl.constexpr, MAGIC: tl.constexpr, DTYPE: tl.constexpr) -> Any:
    """Return two nibbles of each word as floats MAGIC's base + 8 + q: a nibble becomes the last bits of a mantissa."""
    bits = ((words >> SHIFT) & 0x000F000F) ^ MAGIC
    return bits.to(tl.int16).to(DTYPE, bitcast=True), (bits >> 16).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def floats_of_words(
    w: tl.tensor, n: tl.tensor, step: tl.tensor, N: tl.tensor, w_stride: tl.tensor,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr,
) -> Any:  # fmt: skip
    """Load [BLOCK_N, BLOCK_K] of q + 136 in bfloat16, or q + 1032 in float16, from words of eight nibbles.

    Eight weights so take some 16 operations, where a conversion of integers would take fifty.
    """
    MAGIC: tl.constexpr = 0x43084308 if tl.bfloat16 == DTYPE else 0x64086408
    word = step * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
    inside = (n < N)[:, None] & (word < w_stride)[None, :]
    words = tl.load(w + n.to(tl.int64)[:, None] * w_stride + word[None, :], mask=inside, other=0)
    low0, high0 = halves(words, 0, MAGIC, DTYPE)
    low1, high1 = halves(words, 4, MAGIC, DTYPE)
    low2, high2 = halves(words, 8, MAGIC, DTYPE)
    low3, high3 = halves(words, 12, MAGIC, DTYPE)
    low, high = tl.join(tl.join(low0, low2), tl.join(low1, low3)), tl.join(tl.join(high0, high2), tl.join(high1, high3))
    return tl.reshape(tl.permute(tl.join(low, high), (0, 1, 4, 2, 3)), (BLOCK_N, BLOCK_K))


@triton.jit
def centred_weights(
    w: tl.tensor, zero_point: tl.tensor, levels: tl.tensor, of_group: tl.tensor, n: tl.tensor, step: tl.tensor,
    N: tl.tensor, w_stride: tl.tensor, BITS: tl.constexpr, WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr,
) -> Any:  # fmt: skip
    """Load [BLOCK_N, BLOCK_K] of q - z, the weights of channels n in the columns of a step without their scale."""
    if levels is not None:
        codes = stored_integers(w, n, step, N, w_stride, BITS, BLOCK_K).to(tl.int32) & 15
        W = tl.load(levels + codes).to(DTYPE)
    else:
        if WORDS:
            W = floats_of_words(w, n, step, N, w_stride, BLOCK_N, BLOCK_K, DTYPE)
            zero = tl.zeros((BLOCK_N,), tl.int32) + (136 if tl.bfloat16 == DTYPE else 1032)
        else:
            W = stored_integers(w, n, step, N, w_stride, BITS, BLOCK_K).to(DTYPE)
            zero = tl.zeros((BLOCK_N,), tl.int32)
        if zero_point is not None:
            z = tl.load(zero_point + of_group, mask=n < N, other=0)
            if z.dtype.is_floating():  # q - z is then no integer, and is rounded once
                W, zero = W.to(tl.float32), zero.to(tl.float32)
            zero += z
        W = (W - zero.to(W.dtype)[:, None]).to(DTYPE)
    return W


@triton.jit
def weight_only_kernel(
    y: tl.tensor, x: tl.tensor, w: tl.tensor, scale: tl.tensor, zero_point: tl.tensor, levels: tl.tensor,
    bias: tl.tensor, M: tl.tensor, N: tl.tensor, K: tl.tensor, w_stride: tl.tensor,
    BITS: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UNROLL: tl.constexpr, SPLIT_K: tl.constexpr,
) -> None:  # fmt: skip
    """A program computes one part of K of one tile of Y [M, N]; y holds the parts one behind the other.

    An iteration takes UNROLL steps, so that what it reads of a row of weights is long enough for the memory.
    """
    m, n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    start, stop = part_of(tl.cdiv(K, BLOCK_K * UNROLL), SPLIT_K)
    DTYPE: tl.constexpr = x.dtype.element_ty
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for iteration in range(start, stop):
        for part in tl.static_range(UNROLL):
            step = iteration * UNROLL + part
            k = step * BLOCK_K + tl.arange(0, BLOCK_K)
            of_group = n + (step * BLOCK_K // GROUP * N if GROUP else 0)
            W = centred_weights(
                w, zero_point, levels, of_group, n, step, N, w_stride, BITS, WORDS, BLOCK_N, BLOCK_K, DTYPE
            )
            inside = (m < M)[None, :] & (k < K)[:, None]
            X = tl.load(x + m.to(tl.int64)[None, :] * K + k[:, None], mask=inside, other=0.0)
            s = tl.load(scale + of_group, mask=n < N, other=0.0)
            total += tl.dot(W, X, input_precision="ieee") * s[:, None]
    store_output(y + tl.program_id(1).to(tl.int64) * M * N, total, m, n, M, N, None, bias)


@triton.jit
def dequantizing_kernel(
    out: tl.tensor, w: tl.tensor, scale: tl.tensor, zero_point: tl.tensor, levels: tl.tensor,
    N: tl.tensor, K: tl.tensor, w_stride: tl.tensor,
    BITS: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    """A program writes one tile of the weight [N, K] in the dtype of `out`."""
    n, step = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    k = step * BLOCK_K + tl.arange(0, BLOCK_K)
    DTYPE: tl.constexpr = out.dtype.element_ty
    of_group = n + (step * BLOCK_K // GROUP * N if GROUP else 0)
    W = centred_weights(w, zero_point, levels, of_group, n, step, N, w_stride, BITS, WORDS, BLOCK_N, BLOCK_K, DTYPE)
    W = W.to(tl.float32) * tl.load(scale + of_group, mask=n < N, other=0.0)[:, None]
    inside = (n < N)[:, None] & (k < K)[None, :]
    tl.store(out + n.to(tl.int64)[:, None] * K + k[None, :], W.to(DTYPE), mask=inside)


def in_words(num_bits: int, columns: int, dtype: torch.dtype, levels: Tensor | None) -> bool:
    """Return whether eight weights are made of a word at a time."""
    return num_bits == 4 and columns % 8 == 0 and dtype != torch.float32 and levels is None


def dequantize(
    data: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    levels: Tensor | None,
    num_bits: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return W = (q - z) · s, [N, columns] in `dtype`, for operands as `launch` takes them."""
    block_k = step_of(columns, len(scale))
    (G, N), words = scale.shape, in_words(num_bits, columns, dtype, levels)
    data = data.view(torch.int32) if words else data
    W = torch.empty((N, columns), dtype=dtype, device=data.device)
    dequantizing_kernel[(triton.cdiv(N, DEQUANTIZED_ROWS), triton.cdiv(columns, block_k))](
        W, data, scale, zero_point, levels, N, columns, data.shape[1], BITS=num_bits, WORDS=words,
        GROUP=columns // G if G > 1 else 0, BLOCK_N=DEQUANTIZED_ROWS, BLOCK_K=block_k, enable_fp_fusion=False,
    )  # fmt: skip
    return W


def launch(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    levels: Tensor | None,
    bias: Tensor | None,
    num_bits: int,
    config: Config,
) -> Tensor:
    """Compute Y [M, N] = X Wᵀ + bias in the dtype of x, where W = (q - z) · s by group.

    Args:
        x: [M, K], float16, bfloat16 or float32, contiguous.
        data: uint8 [N, ⌈K / 2⌉] of `pack_int4`, or int8 [N, K].
        scale: float32 [G, N] for G equal groups of columns.
        zero_point: integers or floating point [G, N], or None.
        levels: float32 [16], the values of 4-bit codes, which have no zero points; None for integers.
        bias: [N] or None.
        num_bits: 4 or 8, the bits of q.
        config: the tile; an iteration takes `block_k` columns, as many steps of one group as they are.
    """
    (M, K), (G, N) = x.shape, scale.shape
    group, step = K // G if G > 1 else 0, min(step_of(K, G), config.block_k)
    unroll = gcd(config.block_k // step, triton.cdiv(K, step))
    split, words = config.split_k > 1, in_words(num_bits, K, x.dtype, levels)
    data = data.view(torch.int32) if words else data
    y = torch.empty((config.split_k, M, N), dtype=torch.float32 if split else x.dtype, device=x.device)
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    if tiles:
        weight_only_kernel[(tiles, config.split_k)](
            y, x, data, scale, zero_point, levels, None if split else bias, M, N, K, data.shape[1],
            BITS=num_bits, WORDS=words, GROUP=group, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            BLOCK_K=step, UNROLL=unroll, SPLIT_K=config.split_k, **config.options(),
        )  # fmt: skip
    if not split:
        return y[0]
    summed = y.sum(0)
    return (summed if bias is None else summed + bias.float()).to(x.dtype)
