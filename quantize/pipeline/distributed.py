"""Several processes quantize one model together, each on its share of the calibration data.

All ranks take the same steps and differ only in the batches they hold. A sum runs through the ranks in order: each adds
its batches to the sum of the rank before it, so that the result is that of one process to the last bit. The ranks
exchange tensors, never pickled objects. Each exchange starts with a flag that says whether a rank failed, so that no
rank waits for a process that is gone.

On GPUs each rank computes on its own, and sums are passed on by nccl (not yet measured); everything else goes through
gloo. A GPU sums in another order than a CPU, so the last bits then agree only between GPUs of one kind.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from quantize.calibration.gram_sums import add_product, add_products, row_panels
from quantize.calibration.statistics import Statistic
from quantize.errors import QuantizeError, UsageError
from quantize.pipeline.serialization import from_bytes, to_bytes

T = TypeVar("T")
EXCHANGE_TIMEOUT = timedelta(hours=1)  # the longest that one rank may work between two exchanges
FAILURE_TIMEOUT = timedelta(seconds=30)
CPU = torch.device("cpu")
Factors = tuple[Sequence[Tensor], Tensor]


class SingleProcess:
    """A process that works alone.

    Attributes:
        rank: the number of this process, in [0, count).
        count: the number of processes.
    """

    rank, count = 0, 1

    def on(self, device: torch.device) -> SingleProcess:
        """Return the same process with what it receives on a device."""
        del device
        return self

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def shard(self, batches: Sequence[T]) -> Sequence[T]:
        """Return this rank's share of the batches, which are neighbours; every batch is in exactly one share."""
        return batches[self.shard_slice(len(batches))]

    def shard_slice(self, count: int) -> slice:
        """Return the slice of `count` items that is this rank's share."""
        return slice(count * self.rank // self.count, count * (self.rank + 1) // self.count)

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, plain data and tensors (`serialization.py`), in order of ranks."""
        return [value]

    def sum_products(self, totals: Sequence[Tensor], parts: Iterable[Factors]) -> None:
        """Add Σ leftᵀ right over the batches of all ranks to each total, in the order of one process.

        Args:
            totals: matrices [K, K], the same on all ranks.
            parts: this rank's batches in order: a left factor [n, K] for each total, and one right factor [n, K].
        """
        seen = 0
        for lefts, right in parts:
            add_products(totals, lefts, right, seen)
            seen += len(right)


class ProcessGroup(SingleProcess):
    """The processes that `torchrun` started.

    Attributes:
        device: the device on which this process computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.count, self.device = dist.get_rank(), dist.get_world_size(), device

    def on(self, device: torch.device) -> ProcessGroup:
        """Return the same process with what it receives on a device."""
        return ProcessGroup(device)

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, sent as safetensors, which runs no code when it is read."""
        mine = torch.frombuffer(bytearray(to_bytes(value)), dtype=torch.uint8)
        self.check_failure()
        with dist_errors():
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
            dist.all_gather(sizes, torch.tensor([len(mine)]))
            padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
            padded[: len(mine)] = mine
            found = [torch.empty_like(padded) for _ in range(self.count)]
            dist.all_gather(found, padded)
        return [from_bytes(bytes(x[: int(n)].numpy()), self.device) for x, n in zip(found, sizes, strict=True)]

    def sum_products(self, totals: Sequence[Tensor], parts: Iterable[Factors]) -> None:
        """Add this rank's batches to the rows that the rank before has summed, while that rank sums the next rows."""
        held = list(parts)
        before = sum(self.gather(sum(len(right) for _, right in held))[: self.rank])
        for number, total in enumerate(totals):
            for rows in row_panels(len(total)):
                self._pass_on(total, rows, [(lefts[number], right) for lefts, right in held], before)
        with dist_errors():
            for total in totals:
                with by_way_of_cpu(total) as x:
                    dist.broadcast(x, self.count - 1)

    def _pass_on(self, total: Tensor, rows: slice, held: Sequence[tuple[Tensor, Tensor]], seen: int) -> None:
        """Receive the sum of some rows over `seen` tokens, add this rank's batches, and send it to the next rank."""
        if self.rank:
            with dist_errors(), by_way_of_cpu(total[rows]) as x:
                dist.recv(x, self.rank - 1)
        for left, right in held:
            add_product(total, left, right, rows, seen)
            seen += len(right)
        if self.rank + 1 < self.count:
            with dist_errors(), by_way_of_cpu(total[rows]) as x:
                dist.send(x, self.rank + 1)

    def check_failure(self, failed: bool = False) -> None:
        """Ask all ranks whether one failed; a rank that failed itself does not wait long for ranks still at work.

        Raises:
            RankError: a rank failed, or is gone.
        """
        flag = torch.tensor([self.rank + 1 if failed else 0])
        with dist_errors():
            work = dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True)
            work.wait(FAILURE_TIMEOUT if failed else EXCHANGE_TIMEOUT)
        if flag.item() and not failed:
            raise RankError(f"rank {flag.item() - 1} of {self.count} failed, so this one stops too; see its message")


@contextlib.contextmanager
def by_way_of_cpu(x: Tensor) -> Iterator[Tensor]:
    """Yield what the ranks exchange for a tensor: itself, or a copy on the CPU where no backend knows its device."""
    if x.device.type in ("cpu", "cuda"):
        yield x
    else:
        here = x.cpu()
        yield here
        x.copy_(here)


@contextlib.contextmanager
def dist_errors() -> Iterator[None]:
    """Turn the error of an exchange with a process that is gone into a `RankError`."""
    try:
        yield
    except RuntimeError as error:
        raise RankError("another rank is gone, so this one stops too; start all of them anew") from error


class RankError(QuantizeError):
    """Another rank failed, and its message says why."""


def merged(found: Mapping[str, Statistic], make: Callable[[], Statistic], ranks: SingleProcess) -> dict[str, Statistic]:
    """Return the statistics over what all ranks have seen, by name; a rank that has seen nothing may leave names out.

    Args:
        found: the statistics of this rank.
        make: makes an empty statistic.
        ranks: the ranks that take part.
    """
    if ranks.count == 1:
        return dict(found)
    whole: dict[str, Statistic] = {}
    for seen in ranks.gather(dict(found)):
        for name, statistic in seen.items():
            whole.setdefault(name, make()).merge(statistic)
    return whole


def is_rank_zero() -> bool:
    """Return whether this process reports for all that `torchrun` started with it."""
    return int(os.environ.get("RANK", "0")) == 0


def device_of_rank(device: torch.device, rank: int, count: int) -> torch.device:
    """Return the device of one of `count` ranks on a machine: a card of its own, or the CPU.

    Raises:
        UsageError: one card is named, or there are fewer than ranks.
    """
    if device.type == "cpu":
        return device
    if ":" in str(device):
        raise UsageError(f"--device {device}: {count} ranks need a card each; give --device {device.type}")
    if (cards := torch.get_device_module(device).device_count()) < count:
        raise UsageError(f"--device {device}: {count} ranks need a card each, and there are {cards}; start fewer ranks")
    return torch.device(device.type, rank)


@contextlib.contextmanager
def init_distributed(device: torch.device = CPU) -> Iterator[tuple[SingleProcess, torch.device]]:
    """Yield the ranks that `torchrun` started, or this process alone, and its device.

    An error in the body is told to the others.
    """
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield SingleProcess(), device
        return
    here = device_of_rank(device, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    if here.type == "cuda":
        torch.cuda.set_device(here)
    dist.init_process_group("cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo", timeout=EXCHANGE_TIMEOUT)
    ranks = ProcessGroup(here)
    try:
        yield ranks, here
    except RankError:
        raise
    except BaseException:
        with contextlib.suppress(RankError):
            ranks.check_failure(failed=True)
        raise
    finally:
        dist.destroy_process_group()
