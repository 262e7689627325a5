"""What this machine is and how fast, measured in three seconds, and how much memory this process takes."""

from __future__ import annotations

import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from quantize.calibration.gram_sums import FIRST, add_product
from quantize.calibration.precision import bfloat16_products, factor_dtype, multiplies_bfloat16, product_dtype
from quantize.formats.qtensor import L2_ELEMENTS

SIZE, TOKENS = 768, 2048  # of the matrices that are multiplied, and of a batch of activations
ELEMENTS = 1 << 24  # 64 MiB, whose pages are new to the process each time, as most large results are
REPEATS, TURNS = 2, 20  # a virtual machine is half as fast for a second or two where its neighbours work
WIDE = ("avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")  # instructions for products of few bits


@dataclass(frozen=True)
class Machine:
    """Rates of this machine.

    Attributes:
        products: multiply-adds of float32 matrix products, per second.
        sums, rounded: the same where they may be rounded to bfloat16, summed as `add_product` does, and by themselves.
        elements: float32 numbers read, changed and written to new memory, per second.
        cached: the same of so few that they stay in a core's cache.
        operator: seconds that it takes to call an operator on next to nothing.
        file: seconds until a small file is on the disk.
    """

    products: float
    sums: float
    rounded: float
    elements: float
    cached: float
    operator: float
    file: float


@dataclass(frozen=True)
class Processor:
    """What it is called, how many threads it runs, and which of `WIDE` it has."""

    cpu: str
    threads: int
    flags: tuple[str, ...]

    def __str__(self) -> str:
        flags = ", ".join(self.flags) or "no products of integers in hardware"
        return f"{self.cpu}, {self.threads} threads, {flags}"

    @property
    def kind(self) -> str:
        """`amx`, `vnni`, or the architecture where it has neither: speeds of different kinds are not compared."""
        units = [unit for unit in ("amx", "vnni") if any(unit in flag for flag in self.flags)]
        return units[0] if units else platform.machine()


def processor() -> Processor:
    """The one that this runs on, as Linux names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    cpu = names[0] if names else platform.processor()
    return Processor(cpu, os.cpu_count() or 1, tuple(flag for flag in WIDE if flag in flags))


def measure() -> Machine:
    """The best of a few runs of each, all in turn: what slows the machine for a moment slows only some of them."""
    a, b, x, one = torch.ones(SIZE, SIZE), torch.ones(SIZE, SIZE), torch.ones(ELEMENTS), torch.ones(1)
    part = x[:L2_ELEMENTS]
    with bfloat16_products(multiplies_bfloat16()):
        p, q = a.to(product_dtype()), b.to(product_dtype())
        left, right = (torch.ones(TOKENS, SIZE, dtype=factor_dtype()) for _ in range(2))
    total = torch.ones(SIZE, SIZE)

    def summed() -> None:
        with bfloat16_products(multiplies_bfloat16()):
            add_product(total, left, right, slice(0, SIZE), FIRST)

    runs = (write_through, lambda: x * 1.0, lambda: part * 1.0, lambda: [one + one for _ in range(100)],
            lambda: a @ b, summed, lambda: p @ q)  # fmt: skip
    turns = [[best(run, REPEATS) for run in runs] for _ in range(TURNS)]
    file, elements, cached, operator, products, sums, rounded = map(min, zip(*turns, strict=True))
    return Machine(
        products=SIZE**3 / products,
        sums=TOKENS * SIZE**2 / sums,
        rounded=SIZE**3 / rounded,
        elements=ELEMENTS / elements,
        cached=L2_ELEMENTS / cached,
        operator=operator / 100,
        file=file,
    )


def write_through() -> None:
    """Write a small file and wait until it is on the disk."""
    with tempfile.TemporaryFile() as file:
        file.write(b"0")
        file.flush()
        os.fsync(file.fileno())


def best(run: Callable[[], object], repeats: int = REPEATS, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of the fastest of a few runs, after one to warm up."""
    run()
    found = []
    for _ in range(repeats):
        start = clock()
        run()
        found.append(clock() - start)
    return min(found)


def peak_memory() -> int:
    """The most bytes that this process has held so far."""
    status = Path("/proc/self/status")
    if status.exists():  # counted from the start of the program on; getrusage goes on from what started it
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
