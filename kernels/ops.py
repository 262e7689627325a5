"""The only door to the kernels picks an engine for the tensors at hand: Triton on GPUs, the reference elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.kernels import engine
from quantize.kernels.config import LARGEST_PANEL, SMALLEST_STEP, step_of
from quantize.kernels.custom_ops import expert_gemm as expert_operator
from quantize.kernels.custom_ops import gemm as gemm_operator
from quantize.kernels.custom_ops import quantize_tokens
from quantize.kernels.fp4 import decode_scale, encode_scale, nvfp4_global_scale, pack_fp4, unpack_fp4
from quantize.kernels.fp4_linear import fp4_linear
from quantize.kernels.halo import linear_with_int8_backward
from quantize.kernels.packed import PackedWeight, QuantizedActivations
from quantize.kernels.packing import pack_bits, pack_int4, unpack_bits, unpack_int4
from quantize.kernels.prepack import prepack, supported
from quantize.kernels.prologue import NOTHING, Prologue, fuses
from quantize.kernels.reference import (
    centred,
    dequantize,
    fake_integers,
    fake_quantize_dynamically,
    quantize_dynamically,
    quantize_per_token,
    quantized_linear,
)
from quantize.kernels.runtime_smooth import runtime_smooth_linear, smooth_scales
from quantize.kernels.smooth_linear import smooth_linear, smooth_prepack, tile_columns
from quantize.kernels.weight_only_linear import weight_only_linear

__all__ = [
    "LARGEST_PANEL",
    "PackedWeight",
    "Prologue",
    "QuantizedActivations",
    "centred",
    "decode_scale",
    "dequantize",
    "encode_scale",
    "expert_gemm",
    "expert_linear",
    "fake_integers",
    "fake_quantize_dynamically",
    "fp4_linear",
    "fuses",
    "gemm",
    "has_kernel",
    "has_smooth_kernel",
    "has_weight_only_kernel",
    "linear_with_int8_backward",
    "nvfp4_global_scale",
    "on_kernels",
    "pack_bits",
    "pack_fp4",
    "pack_int4",
    "packed_linear",
    "prepack",
    "quantize_activations",
    "quantize_dynamically",
    "quantize_per_token",
    "quantized_linear",
    "round_columns",
    "runtime_smooth_linear",
    "smooth_linear",
    "smooth_prepack",
    "smooth_scales",
    "unpack_bits",
    "unpack_fp4",
    "unpack_int4",
    "weight_only_linear",
]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def quantize_activations(
    x: Tensor,
    num_bits: int,
    symmetric: bool,
    clip_ratio: float,
    layout: str = "int8",
    group_size: int = 0,
    prologue: Prologue = NOTHING,
) -> QuantizedActivations:
    """Quantize tokens dynamically, for `gemm`.

    Args:
        x: [M, K], floating point.
        num_bits: 4 for the layout `pair`, otherwise 2 to 8.
        symmetric: whether the zero point is fixed at 0.
        clip_ratio: the grid spans this part of a token's range, in (0, 1].
        layout: `int8`, or `pair` for weights of 4 bits with one scale a channel (`packed.py`).
        group_size: the group size of asymmetric weights, whose zero points need sums by group; 0 means all columns.
        prologue: an RMSNorm and a Hadamard transform in front, in the same kernel.
    """
    front = (prologue.gain, prologue.epsilon, prologue.hadamard)
    tensors = quantize_tokens(x, num_bits, symmetric, clip_ratio, layout, group_size, *front)
    return QuantizedActivations.of(tensors, layout)


def gemm(
    qa: QuantizedActivations, pw: PackedWeight, bias: Tensor | None = None, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """X Wᵀ + bias, [M, N]; integers are summed exactly, in groups each for itself.

    Args:
        qa: [M, K].
        pw: [N, K].
        bias: [N] or None.
        out_dtype: float16, bfloat16 or float32.
    """
    y: Tensor = gemm_operator(qa.tensors(), qa.layout, pw.tensors(), pw.columns, pw.layout, bias, out_dtype)
    return y


def expert_gemm(
    qa: QuantizedActivations,
    pw: PackedWeight,
    ends: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """X Wₑᵀ + bₑ, [M, N], where e is the expert of the row; integers are summed exactly, in groups each for itself.

    Args:
        qa: [M, K], sorted by expert.
        pw: [E · N, K], the weights of all experts.
        ends: int32 [E], the row behind each expert's last one; the last is M.
        bias: [E · N] or None.
        out_dtype: float16, bfloat16 or float32.
    """
    operands = (qa.tensors(), qa.layout, pw.tensors(), pw.columns, pw.layout)
    y: Tensor = expert_operator(*operands, ends, bias, out_dtype)
    return y


def on_kernels(x: Tensor) -> bool:
    """Return whether activations x [..., K], or columns of weights, run on Triton's kernels."""
    return engine.runs_on_triton(x) and x.dtype in DTYPES


def has_smooth_kernel(x: Tensor, group_size: int) -> bool:
    """Return whether a kernel smooths activations x [..., K] at run time in groups of so many channels."""
    return on_kernels(x) and tile_columns(group_size) > 0


def has_kernel(x: Tensor, groups: int, num_bits: int) -> bool:
    """Return whether a kernel multiplies activations x [..., K] by weights of `num_bits` in so many groups."""
    columns = x.shape[-1]
    group_size = columns // groups if groups > 1 else 0
    return on_kernels(x) and supported(columns, group_size, num_bits)


def has_weight_only_kernel(x: Tensor, groups: int, num_bits: int) -> bool:
    """Return whether a kernel multiplies activations x [..., K], as they are, by weights of `num_bits` in groups."""
    return on_kernels(x) and num_bits in (4, 8) and step_of(x.shape[-1], groups) >= SMALLEST_STEP


def round_columns(
    target: Tensor, reference: Tensor, feedback: Tensor, scale: Tensor, zero_point: Tensor | None, num_bits: int
) -> None:
    """Round up to `LARGEST_PANEL` columns in turn, in place, as `column_rounding.launch` says."""
    from quantize.kernels import column_rounding

    column_rounding.launch(target, reference, feedback, scale, zero_point, num_bits)


def packed_linear(
    x: Tensor,
    pw: PackedWeight,
    bias: Tensor | None,
    num_bits: int,
    symmetric: bool,
    clip_ratio: float,
    hadamard: int = 0,
) -> Tensor:
    """Compute `quantized_linear` on operands as the kernels read them: [..., K] → [..., N] in the dtype of x.

    Args:
        x: float16, bfloat16 or float32.
        pw: [N, K].
        bias: [N] or None.
        num_bits: the bits of the activations.
        symmetric: whether the activations' zero point is fixed at 0.
        clip_ratio: the part of a token's range that its grid spans.
        hadamard: the order of a Hadamard transform in front, as in `Prologue`; 0 for none.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = gemm(activations_for(pw, rows, num_bits, symmetric, clip_ratio, hadamard), pw, bias, x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[1])


def expert_linear(
    x: Tensor,
    pw: PackedWeight,
    ends: Tensor,
    bias: Tensor | None,
    num_bits: int,
    symmetric: bool,
    clip_ratio: float,
    hadamard: int = 0,
) -> Tensor:
    """Compute `packed_linear` with the weight of each row's expert: [M, K] → [M, N] in the dtype of x.

    Args:
        ends: int32 [E], the row behind each expert's last one; rows are sorted by expert.
        x, pw, bias, num_bits, symmetric, clip_ratio, hadamard: as there, with pw [E · N, K] and bias [E · N].
    """
    qa = activations_for(pw, x, num_bits, symmetric, clip_ratio, hadamard)
    return expert_gemm(qa, pw, ends, bias, x.dtype)


def activations_for(
    pw: PackedWeight, rows: Tensor, num_bits: int, symmetric: bool, clip_ratio: float, hadamard: int
) -> QuantizedActivations:
    """Quantize rows [M, K] as the kernel for a weight reads them."""
    pairs = num_bits == 4 and pw.layout == "w4" and pw.group_size == 0
    group_size = 0 if pw.zero_point is None else pw.group_size
    layout, front = "pair" if pairs else "int8", Prologue(hadamard=hadamard)
    return quantize_activations(rows, num_bits, symmetric, clip_ratio, layout, group_size, front)
