"""Tensors in the safetensors files of a model are found by the files' headers and read one by one."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from quantize.checkpoint.untrusted_files import UNREADABLE, tensor_names, weight_files
from quantize.errors import QuantizeError

CHUNK = 1 << 22  # numbers of a tensor that are read or looked at together


def index_tensors(directory: Path, leave_out: str = "") -> dict[str, Path]:
    """Map tensor names to files, from the headers of all safetensors files of a model but `leave_out`.

    Raises:
        UsageError: there are no such files.
        QuantizeError: a file is damaged, or a tensor stands in two files.
    """
    files: dict[str, Path] = {}
    for path in weight_files(directory):
        for name in tensor_names(path) if path.name != leave_out else ():
            if name in files:
                raise QuantizeError(f"{name} stands both in {files[name]} and in {path.name}; remove one of them")
            files[name] = path
    return files


def read_tensor(path: Path, name: str) -> Tensor:
    """Read one tensor, memory-mapped."""
    try:
        with safe_open(path, framework="pt") as opened:
            return opened.get_tensor(name)  # type: ignore[no-any-return]
    except UNREADABLE as error:
        raise QuantizeError(f"{name} cannot be read from {path} ({error})") from None


def read_float(path: Path, name: str) -> Tensor:
    """Read one tensor in float32; the file is mapped a piece at a time, so that the tensor is not in memory twice."""
    stored = read_tensor(path, name)
    if stored.dtype == torch.float32 or not stored.dim():
        return stored.float()
    wide, rows = torch.empty(stored.shape), max(1, CHUNK // max(1, stored[:1].numel()))
    for part, start in zip(wide.split(rows), range(0, len(wide), rows), strict=True):
        part.copy_(read_tensor(path, name)[start : start + rows])
    return wide


def is_finite(x: Tensor) -> bool:
    """Return whether no number in x is infinite or NaN; either would be among the extremes of x."""
    return not x.numel() or bool(torch.stack(x.aminmax()).isfinite().all())
