"""These functions describe the GPU, measure its ceilings, and poison memory to show what was not written."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.gpu.roofline import Roof, specified
from benchmarks.gpu.timing import Timer, time_twice
from quantize.errors import UsageError

SQUARE = 8192
COPIED = 1 << 31  # bytes that are read once and written once


def require_gpu() -> None:
    """Check that torch can use a GPU.

    Raises:
        UsageError: there is none.
    """
    if not torch.cuda.is_available():
        raise UsageError("nothing was measured: torch finds no GPU here; run this where torch.cuda.is_available()")


def describe(root: Path) -> dict[str, Any]:
    """Return what is measured on, and with which versions; `root` is the repository."""
    properties = torch.cuda.get_device_properties(0)
    spec = specified(properties.name)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": output_of("git", "-C", str(root), "rev-parse", "HEAD"),
        "clocks": clocks(),
        "specified": spec and asdict(spec),
    }


def clocks() -> str:
    """Return driver, SM and memory clock in MHz, and power in W, or an empty text without nvidia-smi."""
    asked = "driver_version,clocks.sm,clocks.mem,power.draw"
    return output_of("nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader,nounits")


def output_of(*command: str) -> str:
    """Return what a command prints, or an empty text if there is no such command or it fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def ceilings(device: torch.device, timer: Timer, square: int = SQUARE, copied: int = COPIED) -> Roof:
    """Measure a large copy, and large square products by the vendor's libraries."""
    source = torch.ones(copied // 4, device=device)
    target = torch.empty_like(source)
    rng = torch.Generator(device).manual_seed(0)
    floats = [torch.randn(square, square, generator=rng, device=device).bfloat16() for _ in range(2)]
    integers = [torch.randint(-128, 128, (square, square), generator=rng, device=device, dtype=torch.int8)] * 2
    # by a kernel, since in a graph `copy_` runs on the copy engines (2.7 TB/s on an H200, where kernels read faster)
    copy = time_twice(timer, [lambda: torch.mul(source, 2, out=target)]).median
    bf16 = time_twice(timer, [lambda: floats[0] @ floats[1].T]).median
    int8 = time_twice(timer, [lambda: torch._int_mm(integers[0], integers[1].T)]).median
    operations = 2 * square**3
    return Roof(2 * copied / copy * 1e6, operations / bf16 * 1e6, operations / int8 * 1e6)


def cache_bytes(device: torch.device) -> int:
    """Return the size of the L2 cache in bytes."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill new memory with NaN, or with the largest integer, within the context."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # makes torch.empty fill what it allocates
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
