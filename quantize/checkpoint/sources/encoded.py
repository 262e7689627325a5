"""A float tensor that a file holds in parts: integers or small floats, their scales, and more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.checkpoint.safetensors_reader import Entry
from quantize.checkpoint.tensor_files import require_finite
from quantize.errors import QuantizeError, listed
from quantize.kernels.fp4 import unpack_fp4

Entries = Mapping[str, Entry]  # the dtype and shape of each stored tensor, by name
Parts = Mapping[str, Tensor]  # the parts of a tensor, by their role


@dataclass(frozen=True)
class Encoded:
    """How a tensor is made of its parts.

    Attributes:
        parts: role → name in the files.
        decode: its own name and its parts → float32.
    """

    parts: Mapping[str, str]
    decode: Callable[[str, Parts], Tensor]

    def read(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """Read the parts, each by its name in the files, and return the tensor `name` in float32.

        Raises:
            QuantizeError: the parts do not fit together, or a scale is no finite number.
        """
        found = {role: read(part) for role, part in self.parts.items()}
        for role, part in self.parts.items():
            if "scale" in role:
                require_finite(part, as_float(found[role]))
        return self.put_together(name, found)

    def put_together(self, name: str, found: Parts) -> Tensor:
        """Return the tensor `name` in float32 of its parts, by their role.

        Raises:
            QuantizeError: the parts do not fit together.
        """
        try:
            return self.decode(name, found)
        except (
            ValueError,
            IndexError,
            TypeError,
            RuntimeError,
        ):  # whatever torch raises of parts of any kind
            parts = listed(f"{role} {list(x.shape)} of {x.dtype}" for role, x in found.items())
            raise QuantizeError(f"{name} is stored in parts that do not fit together: {parts}") from None


def find_parts(name: str, entries: Entries, needed: Mapping[str, str], optional: Mapping[str, str]) -> dict[str, str]:
    """Return role → name of the parts of a tensor, those of the optional ones that are there among them.

    Raises:
        QuantizeError: a part that is needed is not there.
    """
    if missing := [part for part in needed.values() if part not in entries]:
        raise QuantizeError(f"{name} is stored in parts, and {missing[0]} is missing; fetch the whole model")
    return {**needed, **{role: part for role, part in optional.items() if part in entries}}


def as_float(scale: Tensor) -> Tensor:
    """Return scales in float32; those of one byte without a sign are E8M0, powers of two."""
    return (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()


def apply_scales(
    name: str,
    q: Tensor,
    scale: Tensor,
    block: tuple[int, int] | None = None,
    zero_point: Tensor | None = None,
    g_idx: Tensor | None = None,
) -> Tensor:
    """Return (q - zero_point) · scale, float32 in the shape of q.

    Args:
        name: the tensor's name, for errors.
        q: [..., N, K], which is overwritten if it is float32.
        scale: one number, or [..., R, C], each of a block of q.
        block: the rows and columns of a block; None for N / R and K / C.
        zero_point: [..., R, C], of any dtype.
        g_idx: the column of `scale` that holds for each column of q, [K]; None for columns in their order.

    Raises:
        QuantizeError: the shapes do not fit together.
    """
    q, scale = q.float(), as_float(scale)
    if scale.numel() == 1:
        return (q if zero_point is None else q.sub_(zero_point.float().reshape(()))).mul_(scale.reshape(()))
    scale, (rows, columns) = scale[..., None] if scale.dim() < 2 else scale, q.shape[-2:]
    parts = scale.shape[-2:]
    size = block or (-(-rows // max(1, parts[0])), -(-columns // max(1, parts[1])))
    wanted = (*q.shape[:-2], *(-(-n // max(1, b)) for n, b in zip((rows, columns), size, strict=True)))
    zero_point = None if zero_point is None else zero_point.reshape(wanted)
    if tuple(scale.shape) != wanted or (block is None and (rows % parts[0] or (g_idx is None and columns % parts[1]))):
        raise QuantizeError(
            f"{name} of the shape {list(q.shape)} cannot have scales of {list(scale.shape)}"
            + (f"; blocks of {size[0]} x {size[1]} need {list(wanted)}" if block else "")
        )
    for what, apply in ((zero_point, q.sub_), (scale, q.mul_)):
        if what is not None:
            apply(spread(what.float(), rows, columns, size, g_idx))
    return q


def spread(x: Tensor, rows: int, columns: int, block: tuple[int, int], g_idx: Tensor | None) -> Tensor:
    """Repeat numbers [..., R, C] of blocks for each row and column: [..., N, K]."""
    each = [min(size, n) for size, n in zip(block, (rows, columns), strict=True)]
    x = x.repeat_interleave(each[0], -2)[..., :rows, :] if x.shape[-2] != rows else x
    return x[..., g_idx.long()] if g_idx is not None else x.repeat_interleave(each[1], -1)[..., :columns]


def unpack_bits(packed: Tensor, bits: int, axis: int) -> Tensor:
    """Return the unsigned numbers of some bits that lie in int32, the lowest bits first, as int32 along an axis.

    `bits` divides 32. Shifting numbers below 0 fills in ones, which the mask takes away.
    """
    axis %= packed.dim()
    shifts = torch.arange(0, 32, bits, dtype=torch.int32).reshape(-1, *[1] * (packed.dim() - axis - 1))
    return ((packed.unsqueeze(axis + 1) >> shifts) & ((1 << bits) - 1)).flatten(axis, axis + 1)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Return the E2M1 values of codes, two to a byte with the first one low, as float32 [..., 2 · bytes]."""
    return unpack_fp4(packed.view(torch.uint8), 2 * packed.shape[-1]).float() / 2
