"""GPTQ's layout: `qweight` int32 [K · bits / 32, N], `qzeros` [G, N · bits / 32], `scales` [G, N], and `g_idx` [K]."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantize.checkpoint.sources.encoded import Encoded, Entries, Parts, apply_scales, find_parts, unpack_bits
from quantize.errors import QuantizeError, UsageError, shown

BITS = (2, 4, 8)


def find(settings: Mapping[str, Any], entries: Entries) -> dict[str, Encoded]:
    """Return the weights that are stored as `qweight`.

    Raises:
        UsageError: the config's bits are none of those that divide 32.
        QuantizeError: a part is missing.
    """
    bits, plus = settings.get("bits", 0), 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    paths = [name.removesuffix(".qweight") for name in entries if name.endswith(".qweight")]
    if paths and bits not in BITS:
        known = ", ".join(map(str, BITS))
        raise UsageError(f"the GPTQ weights have {shown(bits)} bits; weights of {known} can be read")
    return {
        f"{path}.weight": Encoded(packed_parts(path, entries), functools.partial(decode, bits, plus)) for path in paths
    }


def packed_parts(path: str, entries: Entries) -> dict[str, str]:
    """Return the names of the parts of a linear in GPTQ's or AWQ's layout."""
    needed = {"values": f"{path}.qweight", "zero_point": f"{path}.qzeros", "scale": f"{path}.scales"}
    return find_parts(f"{path}.weight", entries, needed, {"g_idx": f"{path}.g_idx"})


def decode(bits: int, plus: int, name: str, parts: Parts) -> Tensor:
    """Return a weight [N, K]; `plus` is added to the zero points, which the first version of the format stores - 1."""
    q, scale = unpack_bits(parts["values"], bits, 0), parts["scale"]
    zero_point = unpack_bits(parts["zero_point"], bits, 1)[:, : scale.shape[-1]] + plus
    return join(name, q, scale, zero_point, parts.get("g_idx"))


def join(name: str, q: Tensor, scale: Tensor, zero_point: Tensor, g_idx: Tensor | None) -> Tensor:
    """Return the weight [N, K] of integers [K, N] whose scales and zero points are [G, N].

    Raises:
        QuantizeError: the shapes do not fit together.
    """
    columns, groups = len(q), len(scale)
    fits = q.dim() == scale.dim() == 2 and zero_point.shape == scale.shape and q.shape[1] == scale.shape[1]
    if not fits or (g_idx is not None and (g_idx.shape != (columns,) or not inside(g_idx, groups))):
        raise QuantizeError(
            f"{name} has integers of {list(q.shape)}, scales of {list(scale.shape)}, zero points of "
            f"{list(zero_point.shape)}{'' if g_idx is None else f' and groups of {list(g_idx.shape)}'}, which do not "
            "fit together"
        )
    return apply_scales(name, q.T.float(), scale.T, None, zero_point.T, g_idx).contiguous()


def inside(g_idx: Tensor, groups: int) -> bool:
    """Return whether all numbers of groups are below the number of groups."""
    return not g_idx.numel() or bool(torch.stack(g_idx.aminmax()).ge(0).all() and g_idx.max() < groups)
