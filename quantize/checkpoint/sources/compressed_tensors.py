"""compressed-tensors, as llm-compressor, Red Hat, Kimi and Gemma publish it.

The dtypes and shapes of the parts say which of its formats a weight has, so that mixed files need no more:
    float-quantized, int-quantized: `weight` in FP8 or int8, `weight_scale`, perhaps `weight_zero_point`
    pack-quantized: `weight_packed` int32, `weight_scale`, `weight_shape`, perhaps zero points and `weight_g_idx`
    nvfp4-pack-quantized, mxfp4-pack-quantized: `weight_packed` uint8, `weight_scale`, perhaps `weight_global_scale`
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from quantize.checkpoint.sources.encoded import (
    Encoded,
    Entries,
    Parts,
    apply_scales,
    find_parts,
    unpack_bits,
    unpack_e2m1,
)
from quantize.errors import QuantizeError, shown

STORED = {"F8_E4M3", "F8_E5M2", "I8"}
GROUP = 16  # of NVFP4; MXFP4 has groups of 32
BITS = (4, 8)


def find(settings: Mapping[str, Any], entries: Entries) -> dict[str, Encoded]:
    """Return the weights that are stored in parts.

    Raises:
        QuantizeError: a part is missing, or the config has blocks that are none.
    """
    block, found = block_structure(settings), {}
    for name, entry in entries.items():
        path, _, leaf = name.rpartition(".")
        weight = f"{path}.weight"
        extra = {role: f"{weight}_{role}" for role in ("zero_point", "g_idx", "shape", "global_scale")}
        if leaf == "weight_packed":
            needed = {"values": name, "scale": f"{weight}_scale"}
            parts = find_parts(weight, entries, needed, extra)
            found[weight] = Encoded(parts, unpack_fp4 if entry.dtype == "U8" else unpack_integers)
        elif leaf == "weight" and entry.dtype in STORED:
            parts = find_parts(name, entries, {"values": name, "scale": f"{name}_scale"}, extra)
            found[name] = Encoded(parts, functools.partial(unpacked, block))
    return found


def block_structure(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the blocks that share a scale, which the shapes of tensors do not tell; None if there are none."""
    groups = settings.get("config_groups")
    known = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    weights = [group.get("weights") for group in known]
    blocks = [w["block_structure"] for w in weights if isinstance(w, dict) and w.get("block_structure")]
    if not blocks:
        return None
    first = blocks[0]
    if blocks.count(first) < len(blocks) or not (
        isinstance(first, list) and len(first) == 2 and all(type(b) is int and b > 0 for b in first)
    ):
        raise QuantizeError(f"the config's block_structure is {shown(blocks)}; one pair of numbers above 0 can be read")
    return first[0], first[1]


def unpacked(block: tuple[int, int] | None, name: str, parts: Parts) -> Tensor:
    """Return a weight of FP8 or int8."""
    values, scale = parts["values"], parts["scale"]
    whole = scale.numel() == 1 or scale.dim() < 2 or scale.shape[-1] == 1 or len(values) == len(scale)
    return apply_scales(name, values, scale, None if whole else block, parts.get("zero_point"))


def unpack_integers(name: str, parts: Parts) -> Tensor:
    """Return a weight of packed integers, which are stored without a sign: of 4 bits as q + 8."""
    values, scale, g_idx = parts["values"], parts["scale"], parts.get("g_idx")
    shape = [int(n) for n in parts["shape"].flatten()] if "shape" in parts else []
    columns = shape[-1] if shape else 0
    bits = next((b for b in BITS if columns and -(-columns * b // 32) == values.shape[-1]), None)
    if bits is None or values.dim() != 2 or len(shape) != 2 or shape[0] != len(values):
        raise QuantizeError(
            f"{name} is packed as {list(values.shape)} numbers of 32 bits for a weight of {shape or 'no'} shape; "
            f"integers of {' and '.join(map(str, BITS))} bits can be read"
        )
    q, zero_point = unpack_bits(values, bits, 1)[:, :columns], parts.get("zero_point")
    if zero_point is not None and zero_point.dtype == values.dtype:
        if zero_point.dim() != 2 or zero_point.shape != (-(-len(values) * bits // 32), scale.shape[-1]):
            raise QuantizeError(f"{name} of the shape {shape} cannot have zero points of {list(zero_point.shape)}")
        zero_point = unpack_bits(zero_point, bits, 0)[: len(values)] - (1 << bits - 1)
    g_idx = None if g_idx is None or bool((g_idx < 0).any()) else g_idx
    if g_idx is not None and (g_idx.shape != (columns,) or int(g_idx.max()) >= scale.shape[-1]):
        raise QuantizeError(f"{name}_g_idx does not give each of {columns} columns one of {scale.shape[-1]} groups")
    return apply_scales(name, q - (1 << bits - 1), scale, None, zero_point, g_idx)


def unpack_fp4(name: str, parts: Parts) -> Tensor:
    """Return a weight of NVFP4, whose scales are divided by the global scale, or of MXFP4, which has none."""
    q, global_scale = unpack_e2m1(parts["values"]), parts.get("global_scale")
    if global_scale is None:
        return apply_scales(name, q, parts["scale"], (1, 2 * GROUP))
    return apply_scales(name, q, parts["scale"].float() / global_scale.float().reshape(()), (1, GROUP))
