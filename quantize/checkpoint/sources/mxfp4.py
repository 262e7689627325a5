"""MXFP4 in stacks of experts, as gpt-oss is published: `X_blocks` [E, N, K / 32, 16] and `X_scales` [E, N, K / 32]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from quantize.checkpoint.sources.encoded import Encoded, Entries, Parts, apply_scales, find_parts, unpack_e2m1
from quantize.errors import QuantizeError

BYTES = 16  # of a group of 32


def find(settings: Mapping[str, Any], entries: Entries) -> dict[str, Encoded]:
    """Return the tensors that are stored as blocks and scales.

    Raises:
        QuantizeError: a scale is missing.
    """
    del settings
    found = {}
    for blocks, entry in entries.items():
        if blocks.endswith("_blocks") and entry.dtype == "U8":
            name = blocks.removesuffix("_blocks")
            parts = find_parts(name, entries, {"values": blocks, "scale": f"{name}_scales"}, {})
            found[name] = Encoded(parts, decode)
    return found


def decode(name: str, parts: Parts) -> Tensor:
    """Return a tensor in float32: [E, K, N] of stacks, as transformers has them, and [N, K] of single linears."""
    blocks, scale = parts["values"], parts["scale"]
    if blocks.dim() not in (3, 4) or blocks.shape[-1] != BYTES or blocks.shape[:-1] != scale.shape:
        raise QuantizeError(f"{name} has blocks of {list(blocks.shape)} and scales of {list(scale.shape)}; a scale is "
                            f"for {BYTES} bytes")  # fmt: skip
    W = apply_scales(name, unpack_e2m1(blocks.flatten(-2)), scale, (1, 2 * BYTES))
    return W.transpose(-1, -2).contiguous() if W.dim() == 3 else W
