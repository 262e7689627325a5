"""A safetensors file whose tensors are written some rows at a time, so that none of them is ever whole in memory."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from quantize.checkpoint.safetensors_reader import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}


class RowWriter:
    """Writes rows of tensors into their places in a new file.

    Args:
        path: the file; one that is there is written anew.
        tensors: the tensors by name, on the meta device.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.path, self.places, end = path, dict[str, int](), 0
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        ordered = sorted(
            tensors, key=lambda name: (-tensors[name].element_size(), name)
        )  # each at a multiple of its size
        for name in ordered:
            x = tensors[name]
            entries[name] = {"dtype": NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [end, end + x.nbytes]}
            self.places[name], end = end, end + x.nbytes
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self.start, self.size = 8 + len(header), 8 + len(header) + end
        self.file = path.open("wb")
        self.file.write(struct.pack("<Q", len(header)) + header)
        self.file.truncate(self.size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def put(self, name: str, first: int, rows: Tensor) -> None:
        """Write rows [n, ...] of a tensor, from row `first` on."""
        raw = rows.contiguous().cpu().flatten().view(torch.uint8)
        self.file.seek(self.start + self.places[name] + first * (raw.numel() // len(rows)))
        self.file.write(raw.numpy().data)
