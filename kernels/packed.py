"""Packed weights and quantized activations have the layouts that the kernels read, and are converted back to integers.

K is padded to whole blocks of 128 columns. A block of 4-bit weights is 64 bytes; byte i holds
    low nibble   w[i] + 8, in [0, 15]      high nibble   w[i + 64], in [-8, 7], two's complement
so that `byte & 15` and `byte & 0xF0` are already operands of an int8 product, w[i] + 8 and 16 · w[i + 64].

Activations of the layout `pair` meet the whole byte b = 16 · w[i + 64] + u with u = w[i] + 8. A block is stored as
    64 × (16 · a[i] - h[i]), then 64 × h[i]      with h[i] = a[i + 64] - 7
which fits in int8 for all a in [-8, 7], and Σ h·b + (16·a - h)·u = 16 · (Σ h·w[i + 64] + Σ a[i]·w[i] + 8 Σ a[i]).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

BLOCK = 128  # columns
HALF = BLOCK // 2
LOW_OFFSET = 8  # low nibbles hold their weight plus this
HIGH_SHIFT = 7  # the second halves of pairs hold their activation minus this


@dataclass(frozen=True)
class PackedWeight:
    """A weight matrix [N, K] in G groups of columns: W = (q - zero_point) · group_scale · scale.

    Values that belong to groups are stored group by group, as the kernels read them.

    Attributes:
        data: int8, [N, K' / 2] in the layout `w4`, [N, K'] in the layout `w8`; K' is K padded to blocks.
        scale: float32 [N].
        group_scale: [G, N], uint8 if that is exact, otherwise float32, and then `scale` is 1; None for G = 1.
        zero_point: int32 [G, N], None for symmetric weights.
        weight_sum: int32 [G, N], Σ (q - zero_point) over the group's columns.
        high_sum: int32 [N], Σ q over the columns in high nibbles.
        counters: int32 [4 · ⌈N / 16⌉] of zeros. Split-K changes and resets them, so one weight must not be multiplied
            on two streams at once.
        columns: K.
        layout: `w4` or `w8`.
    """

    data: Tensor
    scale: Tensor
    group_scale: Tensor | None
    zero_point: Tensor | None
    weight_sum: Tensor
    high_sum: Tensor
    counters: Tensor
    columns: int
    layout: str

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None], columns: int, layout: str) -> PackedWeight:
        """Undo `tensors`."""
        data, scale, group_scale, zero_point, weight_sum, high_sum, counters = cast(Sequence[Any], tensors)
        return cls(data, scale, group_scale, zero_point, weight_sum, high_sum, counters, columns, layout)

    def tensors(self) -> list[Tensor | None]:
        """Return the fields that are tensors, in order."""
        in_groups = [self.group_scale, self.zero_point, self.weight_sum]
        return [self.data, self.scale, *in_groups, self.high_sum, self.counters]

    @property
    def group_size(self) -> int:
        """The number of columns that share a scale; 0 means all."""
        return 0 if self.group_scale is None else self.columns // self.group_scale.shape[0]


@dataclass(frozen=True)
class QuantizedActivations:
    """Activations [M, K], one scale and zero point for each token: X = (q - zero_point) · scale.

    Attributes:
        q: int8 [M, K'] with K' as in `PackedWeight`, padded with the value 0, in the layout's order.
        scale: float32 [M].
        zero_point: int32 [M], 0 for symmetric grids.
        sum: int32 [M, G], Σ q over the weights' groups of columns; for symmetric weights G = 1 is enough.
        low_sum: int32 [M], Σ q over the columns that meet low nibbles.
        layout: `int8`, in natural order, or `pair`, for 4-bit integers.
    """

    q: Tensor
    scale: Tensor
    zero_point: Tensor
    sum: Tensor
    low_sum: Tensor
    layout: str

    @classmethod
    def of(cls, tensors: Sequence[Tensor], layout: str) -> QuantizedActivations:
        """Undo `tensors`."""
        q, scale, zero_point, sums, low_sum = tensors
        return cls(q, scale, zero_point, sums, low_sum, layout)

    def tensors(self) -> list[Tensor]:
        """Return the fields that are tensors, in order."""
        return [self.q, self.scale, self.zero_point, self.sum, self.low_sum]


def pad_columns(q: Tensor) -> Tensor:
    """Pad [..., K] with zeros to whole blocks."""
    return torch.nn.functional.pad(q, (0, -q.shape[-1] % BLOCK))


def halves(q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the columns [..., K'] that meet low nibbles and those that meet high ones, both [..., K' / 128, 64]."""
    low, high = q.unflatten(-1, (-1, 2, HALF)).unbind(-2)
    return low, high


def pack_nibbles(q: Tensor) -> Tensor:
    """Pack int8 [N, K] in [-8, 7] into int8 [N, K' / 2]."""
    low, high = halves(pad_columns(q))
    return ((high << 4) | (low + LOW_OFFSET)).flatten(-2)


def unpack_nibbles(data: Tensor, columns: int) -> Tensor:
    """Undo `pack_nibbles`: int8 [N, K' / 2] → int8 [N, K] with K = `columns`."""
    blocks = data.unflatten(-1, (-1, HALF))
    return torch.stack([(blocks & 15) - LOW_OFFSET, blocks >> 4], dim=-2).flatten(-3)[..., :columns]


def pack_pairs(q: Tensor) -> Tensor:
    """Turn int8 [M, K'] in [-8, 7] into int8 [M, K'] of the layout `pair`."""
    low, high = halves(q)
    return torch.stack([16 * low - (high - HIGH_SHIFT), high - HIGH_SHIFT], dim=-2).flatten(-3)


def unpack_pairs(pairs: Tensor) -> Tensor:
    """Undo `pack_pairs`."""
    first, second = halves(pairs)
    low = (first.to(torch.int16) + second) >> 4
    return torch.stack([low.to(torch.int8), second + HIGH_SHIFT], dim=-2).flatten(-3)


def pack_activations(
    q: Tensor, scale: Tensor, zero_point: Tensor, layout: str, group_size: int = 0
) -> QuantizedActivations:
    """Pack integers in plain order; the fused quantizer must give the same.

    Args:
        q: int8 [M, K].
        scale: [M].
        zero_point: [M].
        layout: `int8`, or `pair` for q in [-8, 7].
        group_size: the group size of the weights, for `sum`; 0 means all columns.
    """
    padded = pad_columns(q)
    sums = q.unflatten(-1, (-1, group_size or q.shape[-1])).sum(-1, dtype=torch.int32)
    low_sum = halves(padded)[0].sum((-2, -1), dtype=torch.int32)
    stored = pack_pairs(padded) if layout == "pair" else padded
    return QuantizedActivations(stored, scale.float(), zero_point.int(), sums, low_sum, layout)
