"""Tensors in the safetensors files of a model are found by the files' headers and read one by one."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from quantize.checkpoint.safetensors_reader import DTYPES, read_header, read_rows
from quantize.checkpoint.untrusted_files import weight_files
from quantize.errors import QuantizeError, shown

CHUNK = 1 << 22  # numbers of a tensor that are read or looked at together


def index_tensors(directory: Path, leave_out: str = "") -> dict[str, Path]:
    """Map tensor names to files, from the headers of all safetensors files of a model but `leave_out`.

    Raises:
        UsageError: there are no such files.
        QuantizeError: a file is damaged, or a tensor stands in two files.
    """
    files: dict[str, Path] = {}
    for path in weight_files(directory):
        for name in read_header(path).entries if path.name != leave_out else ():
            if name in files:
                raise QuantizeError(f"{name} stands both in {files[name]} and in {path.name}; remove one of them")
            files[name] = path
    return files


def read_tensor(path: Path, name: str) -> Tensor:
    """Read one tensor; it raises what `read_rows` raises."""
    return read_rows(path, name)


def read_float(path: Path, name: str) -> Tensor:
    """Read one tensor in float32, a few rows at a time, so that it is not in memory twice."""
    entry = read_header(path).entries.get(name)
    if entry is None or entry.dtype == "F32" or not entry.shape or not entry.shape[0]:
        return read_rows(path, name).float()
    wide = torch.empty(entry.shape)
    rows = max(1, CHUNK // max(1, wide[:1].numel()))
    for part, start in zip(wide.split(rows), range(0, len(wide), rows), strict=True):
        part.copy_(read_rows(path, name, start, rows))
    return wide


def require_finite(name: str, x: Tensor, file: Path | None = None) -> Tensor:
    """Return a tensor; its numbers must be finite. Integers are, and so are floating-point numbers of 8 bits here.

    Raises:
        QuantizeError: one is not; the message names the tensor, its first wrong value and where it stands.
    """
    if x.is_floating_point() and x.element_size() > 1 and not all(map(is_finite, x.flatten().split(CHUNK))):
        index = (~x.isfinite()).nonzero()[0].tolist()
        where = f"{file}: " if file else ""
        raise QuantizeError(f"{where}{name} holds {float(x[tuple(index)])} at {index}; repair the checkpoint first")
    return x


def is_finite(x: Tensor) -> bool:
    """Return whether no number in x is infinite or NaN; either would be among the extremes of x."""
    return not x.numel() or bool(torch.stack(x.aminmax()).isfinite().all())


def header_tensor(path: Path, name: str) -> Tensor:
    """Return a tensor of the shape and dtype that a file's header gives for a name, on the meta device."""
    entry = read_header(path).entries.get(name)
    if entry is None:
        raise QuantizeError(f"{path} holds no {name}")
    if entry.dtype not in DTYPES:
        raise QuantizeError(f"{name} cannot be read from {path} (torch has no type {shown(entry.dtype)})")
    return torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
