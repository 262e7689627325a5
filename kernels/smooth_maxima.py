"""Runtime smooth needs the largest magnitude of every channel over all tokens, after the rotation in front of it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantize.kernels.activation_tile import hadamard, load_rows, mean_square
from quantize.kernels.prologue import Prologue
from quantize.kernels.runtime_smooth import SMALLEST

LEAST: tl.constexpr = tl.constexpr(SMALLEST)


@triton.jit
def smooth_maxima_kernel(
    x_ptr: tl.tensor,
    rotated_ptr: tl.tensor,
    maxima_ptr: tl.tensor,
    M: tl.tensor,
    K: tl.tensor,
    stride: tl.tensor,
    NORMALIZE: tl.constexpr,
    HADAMARD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """A program reads BLOCK_M tokens. Maxima do not depend on the order of operands, so atomics are deterministic."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rms = tl.full((BLOCK_M,), 1.0, tl.float32)
    if NORMALIZE:  # of x, because a rotation does not change it
        rms = tl.maximum(tl.sqrt_rn(mean_square(x_ptr, rows, M, K, stride, BLOCK_K)), LEAST)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = load_rows(x_ptr, rows, k, k, M, K, stride)
        if HADAMARD:
            x = hadamard(x, HADAMARD).to(x.dtype)
            inside = (rows < M)[:, None] & (k < K)[None, :]
            tl.store(rotated_ptr + rows.to(tl.int64)[:, None] * K + k[None, :], x, mask=inside)
        largest = tl.max(tl.abs(tl.div_rn(x.to(tl.float32), rms[:, None])), axis=0)
        tl.atomic_max(maxima_ptr + k, largest.to(tl.int32, bitcast=True), mask=k < K)  # the bits rise with x ≥ 0


def launch(x: Tensor, normalize_tokens: bool, order: int = 0) -> tuple[Tensor, Tensor]:
    """Rotate activations and find the channels' maxima, on the GPU.

    Args:
        x: [M, K] with adjacent columns.
        normalize_tokens: whether each token is first divided by its root mean square.
        order: the order of the Hadamard matrix, as in `Prologue`; 0 for none.

    Returns:
        The rotated x [M, K] in its dtype, or x itself; and its `runtime_smooth.channel_maxima`, float32 [K].
    """
    M, K = x.shape
    rotated = torch.empty((M, K), dtype=x.dtype, device=x.device) if order else x
    maxima = torch.full((K,), 0 if M else 1, dtype=torch.float32, device=x.device)
    block_m, block_k = Prologue(hadamard=order).tile(M, K, 128)
    if not order:
        block_m, block_k = 16, 256
    smooth_maxima_kernel[(triton.cdiv(M, block_m),)](
        x, rotated, maxima.view(torch.int32), M, K, x.stride(0), normalize_tokens, order, block_m, block_k,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return rotated, maxima
