"""Kernels are compiled ahead of time, as a launcher launches them, for a GPU that this machine need not have."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


@dataclass(frozen=True)
class Compiled:
    """A kernel as machine code.

    Attributes:
        name: the kernel's name.
        arch: the architecture for which it was compiled.
        code: SASS or amdgcn, as text.
        registers: the 32-bit registers of each thread; on AMD its vector registers.
        shared: the bytes of shared memory that a CTA asks for.
        threads: the threads of a CTA.
    """

    name: str
    arch: str
    code: str
    registers: int
    shared: int
    threads: int


@dataclass(frozen=True)
class NoDriver:
    """All that Triton needs of a driver until a kernel is launched; the device has the name of its target."""

    target: GPUTarget

    def get_current_device(self) -> str:
        """Return the key by which Triton keeps compiled kernels."""
        return f"{self.target.backend} {self.target.arch}"

    def get_current_stream(self, device: str) -> int:  # noqa: ARG002
        """Return any stream."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """Return the target to compile for."""
        return self.target


def target_of(arch: str) -> GPUTarget:
    """Return Triton's target for a name such as `sm_80` or `gfx942`."""
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


@contextmanager
def compile_only(arch: str) -> Iterator[list[Compiled]]:
    """Make `kernel[grid](...)` compile for `arch` as it would there, and run nothing, within the context.

    Arguments may be tensors of the meta device: their dtypes count, and their addresses are assumed to be aligned to 16
    bytes. Triton's cache is neither read nor written.

    Yields:
        The kernels compiled so far, in order.
    """
    compiled: list[Compiled] = []
    run, target = JITFunction.run, target_of(arch)

    def compile_instead(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:  # noqa: ARG001
        kernel.device_caches.clear()
        made = run(kernel, *args, grid=grid, warmup=True, **options)
        compiled.append(read(made, arch))
        return made

    before = driver._active
    with tempfile.TemporaryDirectory() as cache, knobs.cache.scope():
        knobs.cache.dir = cache
        driver.set_active(NoDriver(target))
        JITFunction.run = compile_instead
        try:
            yield compiled
        finally:
            JITFunction.run = run
            driver._active = before


def read(made: Any, arch: str) -> Compiled:
    """Read the machine code of a kernel that Triton compiled."""
    meta = made.metadata
    threads = meta.num_warps * meta.target.warp_size
    code, usage = (made.asm["amdgcn"],) * 2 if arch.startswith("gfx") else disassemble(made.asm["cubin"])
    found = re.search(r"REG:(\d+)|\.vgpr_count:\s+(\d+)", usage)
    assert found is not None, "the tools no longer tell the registers of a kernel"
    return Compiled(meta.name, arch, code, int(found[1] or found[2]), meta.shared, threads)


def disassemble(cubin: bytes) -> tuple[str, str]:
    """Return SASS with labels, and the use of resources, by the tools that come with Triton."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        code = output_of(knobs.nvidia.nvdisasm.path, "--print-code", str(path))
        usage = output_of(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path))
    return re.sub(r"/\*[0-9a-f]{4,}\*/", "", code), usage


def output_of(*command: str) -> str:
    """Return what a command prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
