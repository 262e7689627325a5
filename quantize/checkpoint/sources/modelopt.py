"""ModelOpt, as NVIDIA publishes it: NVFP4 with `weight_scale` and `weight_scale_2`, both multiplied, and FP8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from quantize.checkpoint.sources.encoded import Encoded, Entries, Parts, apply_scales, find_parts, unpack_e2m1

GROUP = 16
STORED = {"U8", "F8_E4M3"}


def find(settings: Mapping[str, Any], entries: Entries) -> dict[str, Encoded]:
    """Return the weights that are stored in NVFP4 or FP8.

    Raises:
        QuantizeError: a scale is missing.
    """
    del settings
    found = {}
    for name, entry in entries.items():
        if name.endswith(".weight") and entry.dtype in STORED:
            needed = {"values": name, "scale": f"{name}_scale"}
            needed |= {"global_scale": f"{name}_scale_2"} if entry.dtype == "U8" else {}
            found[name] = Encoded(find_parts(name, entries, needed, {}), decode)
    return found


def decode(name: str, parts: Parts) -> Tensor:
    """Return a weight in float32."""
    if "global_scale" not in parts:
        return apply_scales(name, parts["values"], parts["scale"])
    scale = parts["scale"].float() * parts["global_scale"].float().reshape(())
    return apply_scales(name, unpack_e2m1(parts["values"]), scale, (1, GROUP))
