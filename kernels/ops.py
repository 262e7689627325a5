"""The only door to the kernels: picks an engine for the tensors at hand. So far that is the reference everywhere."""

from __future__ import annotations

from quantize.kernels.fp4 import decode_scale, encode_scale, nvfp4_unit, pack_fp4, unpack_fp4
from quantize.kernels.halo import linear_with_int8_backward
from quantize.kernels.packing import pack_int4, unpack_int4
from quantize.kernels.reference import dequantize, quantize_activations, quantize_per_token, quantized_linear
from quantize.kernels.runtime_smooth import runtime_smooth_linear, smooth_scales

__all__ = [
    "decode_scale",
    "dequantize",
    "encode_scale",
    "linear_with_int8_backward",
    "nvfp4_unit",
    "pack_fp4",
    "pack_int4",
    "quantize_activations",
    "quantize_per_token",
    "quantized_linear",
    "runtime_smooth_linear",
    "smooth_scales",
    "unpack_fp4",
    "unpack_int4",
]
