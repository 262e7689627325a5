"""Values of calibration batches need not fit into memory: what exceeds a limit lies in temporary files."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantize.errors import QuantizeError
from quantize.graph.interpreter import Values

IN_MEMORY = 1 << 28  # bytes of one runner's values that stay in memory
PART_OF_MEMORY = 0.25  # of the machine's memory, for values that find no room on a device
SMALL = 1 << 12  # tensors of fewer bytes always stay in memory


class ActivationCache(Sequence[Values]):
    """A sequence of the values of each batch, which are read again each time a batch is asked for.

    Batches that find no room within `IN_MEMORY` have their tensors in a file, and a new file is begun whenever the
    first batch is set. The file has no name and so is gone with the process, however that ends. Tensors come back
    memory-mapped. Values on a device stay there up to `on_device`, then in the machine's memory, then in the file.
    """

    def __init__(self, values: Iterable[Values], directory: Path | None, on_device: int | None = None) -> None:
        """Hold the values.

        Args:
            values: those of each batch.
            directory: where files are made; None leaves all values where they are.
            on_device: how many bytes stay on a device; None leaves all of them there.
        """
        self.directory, self.on_device, self.held = directory, on_device, list[Values]()
        self.file: SpillFile | None = None
        for each in values:
            self.held.append({})
            self[len(self.held) - 1] = each

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, index: Any) -> Any:
        """Return one batch's values; the caller may change the dict."""
        away = (SpilledTensor, HostTensor)
        return {node: x.read() if isinstance(x, away) else x for node, x in self.held[index].items()}

    def __iter__(self) -> Iterator[Values]:
        return (self[index] for index in range(len(self)))

    def __setitem__(self, index: int, values: Values) -> None:
        self.held[index] = {}
        on_device = any(isinstance(x, Tensor) and x.device.type != "cpu" for x in values.values())
        room = self.on_device if on_device else IN_MEMORY
        more = sum(map(size, values.values()))
        if self.directory is None or room is None or self.in_memory() + more <= room:
            self.held[index] = dict(values)
        elif on_device and self._on_host() + more <= PART_OF_MEMORY * machine_memory():
            self.held[index] = {n: HostTensor(x) if size(x) > SMALL else x for n, x in values.items()}
        else:
            self.held[index] = self._spilled(values, new=index == 0)

    def in_memory(self) -> int:
        """The number of bytes that are held in memory."""
        return sum(size(x) for held in self.held for x in held.values())

    def _on_host(self) -> int:
        return sum(x.held.nbytes for held in self.held for x in held.values() if isinstance(x, HostTensor))

    def _spilled(self, values: Values, new: bool) -> Values:
        """Return values with their tensors in the file; small tensors and those that are not contiguous stay in memory.

        Raises:
            QuantizeError: the disk is full.
        """
        try:
            if new or self.file is None:
                self.file = SpillFile(self.directory)
            large = {n: SpilledTensor(x, self.file) for n, x in values.items() if size(x) > SMALL and x.is_contiguous()}
        except OSError as error:
            raise QuantizeError(f"calibration activations cannot be written beside the output ({error})") from error
        return {**values, **large}


class SpillFile:
    """A file without a name, which is closed when the last tensor in it is gone."""

    def __init__(self, directory: Path | None) -> None:
        self.opened = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115
        weakref.finalize(self, self.opened.close)


class SpilledTensor:
    """A tensor in a file."""

    def __init__(self, x: Tensor, file: SpillFile) -> None:
        self.file, self.shape, self.dtype, self.device, self.nbytes = file, x.shape, x.dtype, x.device, x.nbytes
        self.offset = file.opened.seek(-(-file.opened.tell() // 64) * 64)  # aligned as in memory
        rest = x.cpu().reshape(-1).view(torch.uint8).numpy().data
        while len(rest):  # one call writes 2 GiB at most
            rest = rest[file.opened.write(rest) :]

    def read(self) -> Tensor:
        """Return the tensor, memory-mapped or moved to where it was; changes to it do not reach the file."""
        mapped = np.memmap(self.file.opened, np.uint8, "c", self.offset, self.nbytes)
        return torch.from_numpy(mapped).view(self.dtype).view(self.shape).to(self.device)


class HostTensor:
    """A tensor of a device in the machine's memory, pinned if there is such memory."""

    def __init__(self, x: Tensor) -> None:
        self.device, self.held = x.device, pinned_copy(x)

    def read(self) -> Tensor:
        """Return the tensor where it was."""
        return self.held.to(self.device, non_blocking=self.held.is_pinned())


def pinned_copy(x: Tensor) -> Tensor:
    """Return a tensor of a device in the machine's memory, pinned on CUDA, where the current stream copies it."""
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
    return host.copy_(x, non_blocking=x.is_cuda)


def machine_memory() -> int:
    """Return the bytes of the machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def size(value: Any) -> int:
    """Return the number of bytes that a value takes in memory."""
    return value.nbytes if isinstance(value, Tensor) else 0
