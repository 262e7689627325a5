"""4-bit integers lie two to a byte along the last axis, in plain two's complement, with the even index low."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_int4(q: Tensor) -> Tensor:
    """int8 [..., K] with values in [-8, 7] → uint8 [..., ⌈K/2⌉]; an odd K is filled up with one zero."""
    if q.shape[-1] % 2:
        q = torch.nn.functional.pad(q, (0, 1))
    nibbles = q.to(torch.uint8) & 0xF
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: Tensor, columns: int) -> Tensor:
    """uint8 [..., ⌈K/2⌉] → int8 [..., K] with K = `columns`: the inverse of `pack_int4`."""
    low, high = packed << 4, packed & 0xF0  # each nibble in the high half, so that an arithmetic shift carries its sign
    pairs = torch.stack([low, high], dim=-1).view(torch.int8) >> 4
    return pairs.flatten(-2)[..., :columns]
