"""Integers of 3 or 4 bits lie side by side along the last axis, in plain two's complement, the first lowest."""

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


def pack_bits(q: Tensor, num_bits: int) -> Tensor:
    """Pack integers as one stream of bits a row; an odd end is filled up with zeros.

    Args:
        q: int8 [..., K], of which the lowest `num_bits` bits are taken.
        num_bits: b, 3 or 4. Value i has the bits b · i to b · i + b - 1 of its row, which for 4 bits is `pack_int4`.

    Returns:
        uint8 [..., ⌈K · b / 8⌉].
    """
    if num_bits == 4:
        return pack_int4(q)
    eights = torch.nn.functional.pad(q, (0, -q.shape[-1] % 8)).int().unflatten(-1, (-1, 8)) & ((1 << num_bits) - 1)
    words = (eights << bit_offsets(num_bits, q)).sum(-1, dtype=torch.int32)  # b bytes each
    in_bytes = torch.stack([words >> 8 * byte for byte in range(num_bits)], dim=-1).to(torch.uint8)
    return in_bytes.flatten(-2)[..., : -(-q.shape[-1] * num_bits // 8)]


def unpack_bits(packed: Tensor, columns: int, num_bits: int) -> Tensor:
    """uint8 [..., ⌈K · b / 8⌉] → int8 [..., K] with K = `columns`: the inverse of `pack_bits`."""
    if num_bits == 4:
        return unpack_int4(packed, columns)
    parts = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % num_bits)).int().unflatten(-1, (-1, num_bits))
    words = torch.stack([parts[..., byte] << 8 * byte for byte in range(num_bits)]).sum(0, dtype=torch.int32)
    sign = 1 << (num_bits - 1)
    values = (words[..., None] >> bit_offsets(num_bits, packed)) & (2 * sign - 1)
    signed: Tensor = (values ^ sign) - sign
    return signed.to(torch.int8).flatten(-2)[..., :columns]


def bit_offsets(num_bits: int, like: Tensor) -> Tensor:
    """Return where each of eight values begins in its word, int32 [8]."""
    return torch.arange(0, 8 * num_bits, num_bits, dtype=torch.int32, device=like.device)
