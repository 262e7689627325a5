"""Values of calibration batches need not fit into memory: what exceeds a limit lies in temporary files."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, fx

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

    def reserve(self, index: int, node: fx.Node, shape: tuple[int, ...], like: Tensor) -> None:
        """Make room for one more value of a batch, zeros [...] of the dtype and on the device of another tensor.

        Raises:
            QuantizeError: the disk is full.
        """
        room = self.on_device if like.device.type != "cpu" else IN_MEMORY
        more = math.prod(shape) * like.element_size()
        if self.directory is None or room is None or self.in_memory() + more <= room:
            self.held[index][node] = like.new_zeros(shape)
            return
        with writing():
            self.file = self.file or SpillFile(self.directory)
            self.held[index][node] = SpilledTensor(shape, like.dtype, like.device, self.file)

    def put(self, index: int, node: fx.Node, first: int, rows: Tensor) -> None:
        """Write rows [n, ...] of a value that `reserve` made room for, from row `first` on.

        Raises:
            QuantizeError: the disk is full.
        """
        held = self.held[index][node]
        if isinstance(held, SpilledTensor):
            with writing():
                held.write(rows, first)
        else:
            held[first : first + len(rows)] = rows

    def drop(self, index: int, nodes: Iterable[fx.Node]) -> None:
        """Drop values of a batch."""
        for node in nodes:
            self.held[index].pop(node, None)

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
        with writing():
            if new or self.file is None:
                self.file = SpillFile(self.directory)
            large = {n: x for n, x in values.items() if size(x) > SMALL and x.is_contiguous()}
            return {**values, **{n: SpilledTensor.of(x, self.file) for n, x in large.items()}}


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Turn what the disk says into an error of a run."""
    try:
        yield
    except OSError as error:
        raise QuantizeError(f"calibration activations cannot be written beside the output ({error})") from error


class SpillFile:
    """A file without a name, which is closed when the last tensor in it is gone."""

    def __init__(self, directory: Path | None) -> None:
        self.opened, self.end = tempfile.TemporaryFile(dir=directory, buffering=0), 0  # noqa: SIM115
        weakref.finalize(self, self.opened.close)


class SpilledTensor:
    """A tensor in a file, of zeros until it is written."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, file: SpillFile) -> None:
        self.file, self.shape, self.dtype, self.device = file, shape, dtype, device
        self.nbytes = math.prod(shape) * dtype.itemsize
        self.offset = -(-file.end // 64) * 64  # aligned as in memory
        file.end = self.offset + self.nbytes
        file.opened.truncate(file.end)

    @classmethod
    def of(cls, x: Tensor, file: SpillFile) -> Self:
        """Write a tensor."""
        made = cls(tuple(x.shape), x.dtype, x.device, file)
        made.write(x.reshape(-1))
        return made

    def write(self, rows: Tensor, first: int = 0) -> None:
        """Write rows [n, ...] from row `first` on."""
        raw = rows.cpu().reshape(-1).view(torch.uint8).numpy().data
        start = self.offset + first * (len(raw) // max(1, len(rows)))
        while len(raw):  # one call writes 2 GiB at most
            done = os.pwrite(self.file.opened.fileno(), raw, start)
            raw, start = raw[done:], start + done

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
