"""Values of calibration batches need not fit into memory: what exceeds a limit lies in temporary files."""

from __future__ import annotations

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
PART_OF_GPU = 0.25  # the same of a GPU's memory
SMALL = 1 << 12  # tensors of fewer bytes always stay in memory


class ActivationCache(Sequence[Values]):
    """A sequence of the values of each batch, which are read again each time a batch is asked for.

    Batches that find no room within `IN_MEMORY` have their tensors in a file, and a new file is begun whenever the
    first batch is set. The file has no name and so is gone with the process, however that ends. Tensors come back
    memory-mapped.
    """

    def __init__(self, values: Iterable[Values], directory: Path | None) -> None:
        """Hold the values; if no directory for files is given, all of them stay in memory."""
        self.directory, self.held = directory, list[Values]()
        self.file: SpillFile | None = None
        for each in values:
            self.held.append({})
            self[len(self.held) - 1] = each

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, index: Any) -> Any:
        """Return one batch's values; the caller may change the dict."""
        return {node: x.read() if isinstance(x, SpilledTensor) else x for node, x in self.held[index].items()}

    def __iter__(self) -> Iterator[Values]:
        return (self[index] for index in range(len(self)))

    def __setitem__(self, index: int, values: Values) -> None:
        self.held[index] = {}
        fits = self.directory is None or self.in_memory() + sum(map(size, values.values())) <= room(values)
        self.held[index] = dict(values) if fits else self._spilled(values, new=index == 0)

    def in_memory(self) -> int:
        """The number of bytes that are held in memory."""
        return sum(size(x) for held in self.held for x in held.values())

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


def room(values: Values) -> int:
    """Return how many bytes of one runner's values stay where they are: on a GPU a quarter of its memory."""
    on_gpu = next((x.device for x in values.values() if isinstance(x, Tensor) and x.is_cuda), None)
    if on_gpu is None:
        return IN_MEMORY
    return int(torch.cuda.get_device_properties(on_gpu).total_memory * PART_OF_GPU)


def size(value: Any) -> int:
    """Return the number of bytes that a value takes in memory."""
    return value.nbytes if isinstance(value, Tensor) else 0
