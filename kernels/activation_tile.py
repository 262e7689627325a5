"""Kernels on activations share the way of a tile to the quantizer, and a rounding that is the same on every machine."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

MAGIC: tl.constexpr = tl.constexpr(1.5 * 2.0**23)  # float32 has no fraction from 2^23 on: adding it rounds half to even
MAGIC_BITS: tl.constexpr = tl.constexpr(0x4B400000)


@triton.jit
def round_half_even(x: tl.tensor) -> Any:
    """Round float32 with magnitudes below 2^22 to int32, half to even."""
    return (x + MAGIC).to(tl.int32, bitcast=True) - MAGIC_BITS


@triton.jit
def divided(x: tl.tensor, divisor: tl.tensor) -> Any:
    """Return x / divisor as IEEE rounds it, for one divisor > 0 of many x; results below 2^-126 are exact only if 0.

    Both are first scaled by the power of two that brings the divisor to [1, 4). The product with a reciprocal is within
    two units in the last place. One step of Newton's method brings it to one unit, and the next step gives the nearest
    value (Markstein 1990).
    """
    exponent = divisor.to(tl.int32, bitcast=True) >> 23
    power = (tl.maximum(254 - exponent, 1) << 23).to(tl.float32, bitcast=True)
    x, divisor = x * power, divisor * power
    reciprocal = tl.div_rn(1.0, divisor)
    quotient = x * reciprocal
    quotient = tl.fma(tl.fma(-quotient, divisor, x), reciprocal, quotient)
    return tl.fma(tl.fma(-quotient, divisor, x), reciprocal, quotient)


@triton.jit
def sylvester(ORDER: tl.constexpr) -> Any:
    """Return float32 [ORDER, ORDER] of ±1, ORDER ≤ 256: entry (i, j) is -1 if i & j has an odd number of bits."""
    i = tl.arange(0, ORDER)
    bits = i[:, None] & i[None, :]
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    return (1 - 2 * (bits & 1)).to(tl.float32)


@triton.jit
def hadamard(x: tl.tensor, ORDER: tl.constexpr) -> Any:
    """Multiply every ORDER neighbours of [m, k] by Sylvester's matrix / √ORDER, summed in float32: float32 [m, k]."""
    rows: tl.constexpr = x.shape[0] * x.shape[1] // ORDER
    H = sylvester(ORDER).to(x.dtype)
    mixed = tl.dot(tl.reshape(x, (rows, ORDER)), H, input_precision="ieee") * (1.0 / ORDER**0.5)
    return tl.reshape(mixed, (x.shape[0], x.shape[1]))


@triton.jit
def rms_norm(x: tl.tensor, inverse_rms: tl.tensor, gain: tl.tensor) -> Any:
    """Return [m, k] in the dtype of x, rounded to it before and after the gain, as in transformers' norms."""
    normed = (x.to(tl.float32) * inverse_rms[:, None]).to(x.dtype)
    return (normed.to(tl.float32) * gain[None, :].to(tl.float32)).to(x.dtype)


@triton.jit
def mean_square(
    x_ptr: tl.tensor, rows: tl.tensor, M: tl.tensor, K: tl.tensor, stride: tl.tensor, BLOCK_K: tl.constexpr
) -> Any:
    """Return the mean of squares of each row, float32 [m]."""
    total = tl.zeros(rows.shape, tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = load_rows(x_ptr, rows, k, k, M, K, stride).to(tl.float32)
        total += tl.sum(x * x, axis=1)
    return tl.div_rn(total, K * 1.0)


@triton.jit
def inverse_rms_of(
    x_ptr: tl.tensor,
    gain: tl.tensor,
    rows: tl.tensor,
    M: tl.tensor,
    K: tl.tensor,
    stride: tl.tensor,
    epsilon: tl.tensor,
    BLOCK_K: tl.constexpr,
) -> Any:
    """Return 1 / √(mean square + epsilon), float32 [m], for `rms_norm`; ones if there is no norm."""
    if gain is None:
        return tl.full(rows.shape, 1.0, tl.float32)
    else:
        return tl.div_rn(1.0, tl.sqrt_rn(mean_square(x_ptr, rows, M, K, stride, BLOCK_K) + epsilon))


@triton.jit
def load_rows(
    x_ptr: tl.tensor, rows: tl.tensor, k: tl.tensor, source: tl.tensor, M: tl.tensor, K: tl.tensor, stride: tl.tensor
) -> Any:
    """Load the columns `source` of rows, [m, k], with 0 outside of [M, K]."""
    inside = (rows < M)[:, None] & (k < K)[None, :]
    return tl.load(x_ptr + rows.to(tl.int64)[:, None] * stride + source[None, :], mask=inside, other=0.0)


@triton.jit
def load_activations(
    x_ptr: tl.tensor,
    gain: tl.tensor,
    order: tl.tensor,
    smooth: tl.tensor,
    inverse_rms: tl.tensor,
    rows: tl.tensor,
    k: tl.tensor,
    M: tl.tensor,
    K: tl.tensor,
    stride: tl.tensor,
    HADAMARD: tl.constexpr,
) -> Any:
    """Return float32 [m, k] as the quantizer sees it: normed, rotated, sorted and smoothed, each if asked for."""
    source = k if order is None else tl.load(order + k, mask=k < K, other=0)
    x = load_rows(x_ptr, rows, k, source, M, K, stride)
    if gain is not None:
        x = rms_norm(x, inverse_rms, tl.load(gain + k, mask=k < K, other=0.0))
    if HADAMARD:
        x = hadamard(x, HADAMARD)
    x = x.to(tl.float32)
    if smooth is not None:
        x = tl.div_rn(x, tl.load(smooth + k, mask=k < K, other=1.0)[None, :])
    return x
