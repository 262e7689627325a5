"""Safetensors files are read with `read`, not mapped: a mapped file that somebody cuts kills the process that reads it.

The format: 8 bytes with the length of the header, the header in JSON, and the tensors one behind the other
(https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import functools
import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, TypeAdapter, ValidationError
from torch import Tensor

from quantize.checkpoint.files_seen import stamp
from quantize.checkpoint.paths import LARGEST_HEADER, LONGEST_NAME
from quantize.errors import ChangedError, QuantizeError, shown

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


class Entry(BaseModel):
    """One tensor of a header; offsets count from the end of the header."""

    model_config = ConfigDict(strict=True)
    dtype: str
    shape: Annotated[list[NonNegativeInt], Field(max_length=64)]  # torch has no more axes
    data_offsets: Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]


HEADER = TypeAdapter(dict[str, Entry])


@dataclass(frozen=True)
class Header:
    """What a file says of itself: its tensors by name, its metadata, and where the tensors begin."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, Any]
    start: int


def read_header(path: Path) -> Header:
    """Read and check the header of a file; it is kept as long as the file stays the same.

    Raises:
        QuantizeError: the header or the size of the file is not sound.
    """
    try:
        return cached_header(path, stamp(path))
    except (OSError, ValueError, RecursionError) as error:
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise QuantizeError(f"{path} is truncated or no safetensors file ({why})") from None


@functools.lru_cache(16)
def cached_header(path: Path, seen: tuple[int, ...]) -> Header:
    """Read and check a header; `seen` tells states of the file apart."""
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 0 < length <= min(LARGEST_HEADER, seen[0] - 8):
            raise ValueError(f"a header of {length} bytes in a file of {seen[0]}")
        content = json.loads(file.read(length), object_pairs_hook=without_duplicates)
    metadata = content.pop("__metadata__", {}) if isinstance(content, dict) else {}
    entries, end = HEADER.validate_python(content), 0
    if (longest := max(map(len, entries), default=0)) > LONGEST_NAME:
        raise ValueError(f"a tensor has a name of {longest} characters")
    if odd := next((name for name in entries if not name.isprintable()), None):
        raise ValueError(f"a tensor is called {shown(odd)}, which a terminal would obey")
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, stop = entry.data_offsets
        size = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize if entry.dtype in DTYPES else stop - begin
        if begin != end or stop - begin != size:
            raise ValueError(f"{shown(name)} lies at {begin} to {stop} and takes {size} bytes behind {end}")
        end = stop
    if 8 + length + end != seen[0]:
        raise ValueError(f"{8 + length + end} bytes are described, and the file has {seen[0]}")
    return Header(entries, metadata if isinstance(metadata, dict) else {}, 8 + length)


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the content of a JSON object; a key that stands twice is an error."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {shown(next(key for key in keys if keys.count(key) > 1))} stands twice")
    return found


def read_rows(path: Path, name: str, first: int = 0, count: int | None = None) -> Tensor:
    """Read some rows of a tensor, or all of it, into memory of its own.

    Args:
        path: the file.
        name: the tensor.
        first: the first row; 0 for a tensor without axes.
        count: the number of rows; None takes all from the first on.

    Raises:
        QuantizeError: there is no such tensor, or its type is none of torch's.
        ChangedError: the file has become shorter meanwhile.
    """
    header = read_header(path)
    if name not in header.entries:
        raise QuantizeError(f"{path} holds no tensor {shown(name)}")
    entry = header.entries[name]
    dtype, shape = DTYPES.get(entry.dtype), list(entry.shape)
    if dtype is None:
        raise QuantizeError(f"{name} cannot be read from {path} (torch has no type {shown(entry.dtype)})")
    if count is not None or first:
        rest = shape[0] - first
        shape = [rest if count is None else min(count, rest), *shape[1:]]
    raw = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
    offset = header.start + entry.data_offsets[0] + first * math.prod(shape[1:]) * dtype.itemsize
    try:
        with path.open("rb", buffering=0) as file:
            whole = read_into(file, offset, raw.numpy().data)
    except OSError as error:
        raise QuantizeError(f"{name} cannot be read from {path} ({error})") from None
    if not whole:
        raise ChangedError(f"{path} has become shorter while it was read; start again with files that stay as they are")
    return raw.view(dtype).view(shape)


def read_into(file: BinaryIO, offset: int, into: memoryview) -> bool:
    """Read bytes from an offset on, and return whether there were enough."""
    while into:
        done = os.preadv(file.fileno(), [into[: 1 << 30]], offset)
        if not done:
            return False
        into, offset = into[done:], offset + done
    return True
