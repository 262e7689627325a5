"""FP4 matrices are multiplied by `tl.dot_scaled`, which Triton emulates if tensor cores do not know the formats.

Weights are read as artifacts store them, by `fp4.pack_fp4` and `fp4.encode_scale`, without repacking.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantize.kernels.config import Config
from quantize.kernels.epilogue import store_output
from quantize.kernels.fp4_quantizer import Fp4Activations, e4m3_value


@triton.jit
def e2m1_values(packed: tl.tensor) -> Any:
    """Unpack uint8 [m, k] to float16 [m, 2k] of ±{0, 1, 2, 3, 4, 6, 8, 12} / 2."""
    code = packed.to(tl.int32)
    code = tl.reshape(tl.join(code & 15, code >> 4), (packed.shape[0], packed.shape[1] * 2))
    exponent, fraction = (code >> 1) & 3, code & 1
    size = tl.where(exponent > 0, (2 + fraction) << tl.maximum(exponent - 1, 0), fraction)
    return (tl.where(code >= 8, -size, size).to(tl.float32) * 0.5).to(tl.float16)


@triton.jit
def nvfp4_values(packed: tl.tensor, scale: tl.tensor) -> Any:
    """Multiply values of uint8 [m, k] by E4M3 as uint8 [m, g]: float16 [m, 2k], which holds the products exactly."""
    groups: tl.constexpr = scale.shape[1]
    values = tl.reshape(e2m1_values(packed), (packed.shape[0], groups, packed.shape[1] * 2 // groups))
    scaled = values * e4m3_value(scale.to(tl.int32)).to(tl.float16)[:, :, None]
    return tl.reshape(scaled, (packed.shape[0], packed.shape[1] * 2))


@triton.jit
def load_tile(ptr: tl.tensor, rows: tl.tensor, columns: tl.tensor, width: tl.tensor, EVEN: tl.constexpr) -> Any:
    """Load [m, k] of a matrix without gaps, with zeros beyond its width; if EVEN, no column is beyond it."""
    address = ptr + rows.to(tl.int64)[:, None] * width + columns[None, :]
    if EVEN:
        return tl.load(address)
    else:
        return tl.load(address, mask=(columns < width)[None, :], other=0)


@triton.jit
def scaled_product(
    y: tl.tensor,
    w: tl.tensor,
    scale_w: tl.tensor,
    x: tl.tensor,
    scale_x: tl.tensor,
    NVFP4: tl.constexpr,
    PURE: tl.constexpr,
) -> Any:
    """Add w xᵀ to y, for tiles of codes and bytes of scales."""
    if NVFP4 and PURE:
        return tl.dot(nvfp4_values(w, scale_w), tl.trans(nvfp4_values(x, scale_x)), y)
    else:
        if NVFP4:
            scale_w, scale_x = scale_w.to(tl.float8e4nv, bitcast=True), scale_x.to(tl.float8e4nv, bitcast=True)
        return tl.dot_scaled(w, scale_w, "e2m1", tl.trans(x), scale_x, "e2m1", y)


@triton.jit
def fp4_gemm_kernel(
    x_ptr: tl.tensor,
    scale_x_ptr: tl.tensor,
    global_scale_x: tl.tensor,
    w_ptr: tl.tensor,
    scale_w_ptr: tl.tensor,
    global_scale_w: tl.tensor,
    bias: tl.tensor,
    y_ptr: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    row_bytes: tl.tensor,
    groups: tl.tensor,
    GROUP: tl.constexpr,
    PURE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """A program computes BLOCK_N output channels of BLOCK_M tokens."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, channel = rows % M, n % N  # rows beyond the last are read but not written
    y = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, K, BLOCK_K):
        byte = start // 2 + tl.arange(0, BLOCK_K // 2)
        group = start // GROUP + tl.arange(0, BLOCK_K // GROUP)
        w, scale_w = (
            load_tile(w_ptr, channel, byte, row_bytes, EVEN),
            load_tile(scale_w_ptr, channel, group, groups, EVEN),
        )
        x, scale_x = load_tile(x_ptr, row, byte, row_bytes, EVEN), load_tile(scale_x_ptr, row, group, groups, EVEN)
        y = scaled_product(y, w, scale_w, x, scale_x, global_scale_w is not None, PURE)
    if global_scale_w is not None:
        y *= tl.load(global_scale_w)
    store_output(y_ptr, y, rows, n, M, N, global_scale_x, bias)


def launch(
    x: Fp4Activations,
    data: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    config: Config,
    pure: bool = False,
) -> Tensor:
    """Compute `x Wᵀ + bias` on the GPU; products of FP4 values are summed in float32.

    Args:
        x: the result of `fp4_quantizer.launch`, in the format of the weights.
        data: the weights, uint8 [N, K / 2] of `fp4.pack_fp4`.
        scale: uint8 [N, G], the bytes of `fp4.encode_scale`.
        global_scale: float32 [] for NVFP4, None for MXFP4.
        bias: [N] or None.
        dtype: the dtype of the result.
        config: tile and launch parameters; `split_k` and `variant` are not used.
        pure: whether NVFP4 runs without `dot_scaled`, in float16, for machines and interpreters that lack its scales.

    Returns:
        [M, N].
    """
    (M, row_bytes), N, groups = x.q.shape, len(data), x.scale.shape[1]
    y = torch.empty((M, N), dtype=dtype, device=x.q.device)
    fp4_gemm_kernel[(triton.cdiv(M, config.block_m), triton.cdiv(N, config.block_n))](
        x.q, x.scale, x.global_scale, data, scale, global_scale, bias, y,
        M, N, 2 * row_bytes, row_bytes, groups, 2 * row_bytes // groups, pure, 2 * row_bytes % config.block_k == 0,
        config.block_m, config.block_n, config.block_k, **config.options(),
    )  # fmt: skip
    return y
