"""FP8 in blocks, as DeepSeek, MiniMax, GLM and Qwen publish it: `weight` times `weight_scale_inv`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from quantize.checkpoint.sources.encoded import Encoded, Entries, Parts, apply_scales, find_parts, unpack_e2m1
from quantize.errors import QuantizeError, shown

FP8 = {"F8_E4M3", "F8_E5M2"}
FP4_GROUP = 32  # of experts in MXFP4 within an FP8 checkpoint (DeepSeek-V4)


def find(settings: Mapping[str, Any], entries: Entries) -> dict[str, Encoded]:
    """Return the tensors that are stored in FP8, and those of four bits whose scales have the same names.

    The scales are one number or one for each block, floating point or E8M0; blocks at the edges may be cut off.

    Raises:
        QuantizeError: a scale is missing, or the block size is none.
    """
    block = settings.get("weight_block_size")
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)
    ):
        raise QuantizeError(f"the config's weight_block_size is {shown(block)}; it is two numbers above 0, or null")
    found = {}
    for name, entry in entries.items():
        packed = entry.dtype in {"I8", "U8"} and f"{name}_scale_inv" in entries
        if packed or (entry.dtype in FP8 and not name.endswith("_scale_inv") and len(entry.shape) > 1):
            parts = find_parts(name, entries, {"values": name, "scale": f"{name}_scale_inv"}, {})
            found[name] = Encoded(parts, functools.partial(decode, None if block is None else (block[0], block[1])))
    return found


def decode(block: tuple[int, int] | None, name: str, parts: Parts) -> Tensor:
    """Return a tensor in float32; it raises what `apply_scales` raises."""
    if parts["values"].element_size() == 1 and not parts["values"].is_floating_point():
        return apply_scales(name, unpack_e2m1(parts["values"]), parts["scale"], (1, FP4_GROUP))
    return apply_scales(name, parts["values"], parts["scale"], block)
