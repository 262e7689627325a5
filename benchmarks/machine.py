"""These functions name the processor and time the fastest of a few runs on it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

WIDE = ("avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")  # instructions for products of few bits


@dataclass(frozen=True)
class Processor:
    """The name of a processor, the number of its threads, and those of `WIDE` that it has."""

    cpu: str
    threads: int
    flags: tuple[str, ...]

    def __str__(self) -> str:
        flags = ", ".join(self.flags) or "no products of integers in hardware"
        return f"{self.cpu}, {self.threads} threads, {flags}"

    @property
    def kind(self) -> str:
        """`amx`, `vnni`, or the architecture if it has neither; speeds of different kinds are not compared."""
        units = [unit for unit in ("amx", "vnni") if any(unit in flag for flag in self.flags)]
        return units[0] if units else platform.machine()


def processor() -> Processor:
    """Return the processor of this machine, as Linux names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    cpu = names[0] if names else platform.processor()
    return Processor(cpu, os.cpu_count() or 1, tuple(flag for flag in WIDE if flag in flags))


def best_of(run: Callable[[], object], repeats: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds of the fastest of a few runs, after one to warm up."""
    run()
    found = []
    for _ in range(repeats):
        start = clock()
        run()
        found.append(clock() - start)
    return min(found)
