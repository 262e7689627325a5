"""The header of a GGUF file, without the values of its arrays, for which the package gguf takes a GB and half a minute.

The format: magic, version, the numbers of tensors and of keys, the keys with their values, and the name, shape, type
and offset of each tensor, all little-endian (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from quantize.errors import shown

MAGIC, VERSIONS = b"GGUF", (2, 3)
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # type of a value → its bytes
UINT32, STRING, ARRAY = 4, 8, 9
LONGEST, AXES = 1 << 16, 4  # bytes of a name, and axes of a tensor
FARTHEST = 1 << 60  # bytes; no file is as long
ALIGNMENT, LARGEST_ALIGNMENT = 32, 1 << 20  # of the bytes where tensors begin


class Place(NamedTuple):
    """Where a tensor lies: its type in gguf, its shape in torch's order, and its bytes."""

    kind: Any
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Header:
    """What a file calls the kind of its model, and where its tensors lie, by gguf's names."""

    architecture: str
    places: dict[str, Place]


def parse_header(path: Path) -> Header:
    """Read a header.

    Raises:
        ValueError: it is not sound.
        OSError: the file cannot be read.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    with path.open("rb") as file:
        if file.read(4) != MAGIC or number(file, "<I") not in VERSIONS:
            raise ValueError("it does not begin as GGUF of version 2 or 3 does")
        tensors, keys = number(file, "<Q"), number(file, "<Q")
        found = {string(file): value_of(file) for _ in range(keys)}
        listed = []
        for _ in range(tensors):
            name, axes = string(file), number(file, "<I")
            if axes > AXES:
                raise ValueError(f"a tensor has {axes} axes")
            shape = [number(file, "<Q") for _ in range(axes)]
            listed.append((name, shape, GGMLQuantizationType(number(file, "<I")), number(file, "<Q")))
        alignment = found.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= LARGEST_ALIGNMENT:
            raise ValueError("its alignment is no small number")
        start = -(-file.tell() // alignment) * alignment
    places = {}
    for name, shape, kind, offset in listed:
        block, size = GGML_QUANT_SIZES[kind]
        if name in places or (shape and shape[0] % block):
            raise ValueError(f"{shown(name)} stands twice, or its rows are no whole blocks")
        places[name] = Place(kind, (*shape[::-1],), start + offset, math.prod(shape) // block * size)
    return Header(str(found.get("general.architecture") or ""), places)


def number(file: BinaryIO, layout: str) -> int:
    """Read a number of a layout of `struct`."""
    return int(struct.unpack(layout, read(file, struct.calcsize(layout)))[0])


def string(file: BinaryIO) -> str:
    """Read a name."""
    length = number(file, "<Q")
    if length > LONGEST:
        raise ValueError(f"a name has {length} bytes")
    return read(file, length).decode()


def value_of(file: BinaryIO) -> str | int | None:
    """Read a text or a number of 32 bits; read past any other value, and return None."""
    kind = number(file, "<I")
    if kind == UINT32:
        return number(file, "<I")
    if kind == STRING:
        return text(file)
    inner, count = (number(file, "<I"), number(file, "<Q")) if kind == ARRAY else (kind, 1)
    if inner == STRING:
        for _ in range(count):
            text(file)
    elif inner in SIZES:
        skip(file, count * SIZES[inner])
    else:
        raise ValueError(f"a value has the unknown type {inner}")
    return None


def text(file: BinaryIO) -> str | None:
    """Read a text, or read past one that is too long to be a name."""
    length = number(file, "<Q")
    if length <= LONGEST:
        return read(file, length).decode(errors="replace")
    skip(file, length)
    return None


def read(file: BinaryIO, count: int) -> bytes:
    """Read so many bytes."""
    content = file.read(count)
    if len(content) < count:
        raise ValueError("it ends within its header")
    return content


def skip(file: BinaryIO, count: int) -> None:
    """Go past so many bytes."""
    if count:
        file.seek(min(count, FARTHEST) - 1, 1)
        read(file, 1)
