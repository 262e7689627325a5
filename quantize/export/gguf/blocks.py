"""Weights become blocks of GGUF, each of which has its own scale and holds neighbouring columns of one row.

Source: the package gguf 0.19, `quants.py`, and `ggml-common.h` of llama.cpp.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from quantize.errors import QuantizeError
from quantize.formats.qtensor import QTensor
from quantize.scheme.scheme import WeightArgs

BLOCK = 32  # columns of a block of integers or of MXFP4
NVFP4_BLOCK = 64  # columns of a block of NVFP4, of four groups
FLOATS = {torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}


class Blocks(NamedTuple):
    """A matrix as GGUF holds it.

    Attributes:
        data: the bytes of each row, uint8 [N, bytes].
        type: how they are read.
        scale: what all values are multiplied by, float32 [1]; None for most types.
    """

    data: Tensor
    type: Type
    scale: Tensor | None = None


def type_of(args: WeightArgs) -> Type | None:
    """Return the type that holds weights as they are, or None if there is no such type."""
    if args.format == "int":
        if args.num_bits < 4:
            return None
        if args.num_bits == 4:
            return Type.Q4_0 if args.symmetric else Type.Q4_1
        return Type.Q8_0 if args.symmetric else None
    return {"mxfp4": Type.MXFP4, "nvfp4": Type.NVFP4, "q4_1": Type.Q4_1, "iq4_nl": Type.IQ4_NL}.get(args.format)


def block_of(args: WeightArgs) -> int:
    """Return the number of columns in a block of these weights."""
    return NVFP4_BLOCK if args.format == "nvfp4" else BLOCK


def blocks(weight: QTensor) -> Blocks:
    """Return a weight [N, K] of a type that `type_of` has, with its integers; scales are rounded to float16."""
    kind = type_of(weight.args)
    if kind == Type.NVFP4:
        assert weight.global_scale is not None
        halves = interleaved(weight.data, 16).unflatten(1, (-1, 4)).flatten(2)
        scales = weight.scale.view(torch.uint8).unflatten(1, (-1, 4))
        return Blocks(torch.cat([scales, halves], dim=2).flatten(1), kind, weight.global_scale.reshape(1))
    if kind == Type.MXFP4:
        return Blocks(torch.cat([weight.scale[..., None], interleaved(weight.data, BLOCK)], dim=2).flatten(1), kind)
    if kind == Type.IQ4_NL:
        scale = as_float16(per_block(weight.scale, weight.columns))
        return Blocks(torch.cat([scale, interleaved(weight.data, BLOCK)], dim=2).flatten(1), kind)
    q, scale = weight.unpack().unflatten(1, (-1, BLOCK)), per_block(weight.scale, weight.columns)
    if kind == Type.Q8_0:
        return Blocks(torch.cat([as_float16(scale), q.view(torch.uint8)], dim=2).flatten(1), kind)
    assert kind is not None
    unsigned = (q + 8).view(torch.uint8)
    parts = [as_float16(scale)]
    if weight.zero_point is not None:
        zero = per_block(weight.zero_point, weight.columns).float() + 8
        parts.append(as_float16(-zero * scale.float()))
    parts.append(unsigned[..., : BLOCK // 2] | unsigned[..., BLOCK // 2 :] << 4)
    return Blocks(torch.cat(parts, dim=2).flatten(1), kind)


def per_block(values: Tensor, columns: int) -> Tensor:
    """Repeat the value of each group [N, G] for each of its blocks: [N, K / 32]."""
    return values.repeat_interleave(columns // BLOCK // values.shape[1], dim=1)


def as_float16(values: Tensor) -> Tensor:
    """Return values [N, B] as the two bytes of a float16, uint8 [N, B, 2].

    Raises:
        QuantizeError: a value is too large for float16.
    """
    halves = values.half()
    if not bool(halves.isfinite().all()):
        raise QuantizeError("a scale is too large for float16, in which GGUF holds scales; report the model")
    as_bytes: Tensor = halves[..., None].contiguous().view(torch.uint8)
    return as_bytes


def interleaved(packed: Tensor, group: int) -> Tensor:
    """Pack codes anew, uint8 [N, K/2] with the even column low → [N, K / group, group / 2] with the first half low."""
    codes: Tensor = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(1).unflatten(1, (-1, group))
    return codes[..., : group // 2] | codes[..., group // 2 :] << 4


def plain(tensor: Tensor) -> Blocks:
    """Return a tensor in floating point: a matrix in its own dtype, anything else in float32."""
    kept = tensor.contiguous() if tensor.dim() == 2 and tensor.dtype in FLOATS else tensor.float().contiguous()
    return Blocks(kept.view(torch.uint8), FLOATS[kept.dtype])
