"""The number of CTAs of a kernel that fit an SM at once follows from what each of them uses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Multiprocessor:
    """The limits of one SM (CUDA programming guide, table of compute capabilities) or CU (CDNA3 ISA, chapter 3).

    Attributes:
        registers: the number of 32-bit registers.
        warps: the number of resident warps.
        ctas: the number of resident CTAs.
        shared: the bytes of shared memory for CTAs.
        reserved: the bytes of it that each CTA takes beyond its own.
        warp_size: the number of threads in a warp.
        partitions: the number of parts, each of which owns an equal share of registers and warps.
    """

    registers: int
    warps: int
    ctas: int
    shared: int
    reserved: int = 1024
    warp_size: int = 32
    partitions: int = 4


KB = 1024
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(64 * KB, 64, 32, 164 * KB),
    "sm_89": Multiprocessor(64 * KB, 48, 24, 100 * KB),
    "sm_90": Multiprocessor(64 * KB, 64, 32, 228 * KB),
    "sm_100": Multiprocessor(64 * KB, 64, 32, 228 * KB),
    "sm_120": Multiprocessor(64 * KB, 48, 24, 100 * KB),
    "gfx942": Multiprocessor(128 * KB, 32, 16, 64 * KB, reserved=0, warp_size=64),
}
GRANULE = 8  # registers of a thread are allocated by eights


def resident(arch: str, registers: int, shared: int, threads: int) -> int:
    """Return the number of CTAs that an SM holds, which is 0 if not even one fits.

    Args:
        arch: a key of `MULTIPROCESSORS`.
        registers: the registers of each thread.
        shared: the bytes of each CTA.
        threads: the threads of a CTA.
    """
    sm = MULTIPROCESSORS[arch]
    warps = -(-threads // sm.warp_size)
    each = -(-max(registers, 1) // GRANULE) * GRANULE * sm.warp_size
    warps_by_registers = sm.registers // sm.partitions // each * sm.partitions
    by_shared = sm.shared // (shared + sm.reserved) if shared + sm.reserved else sm.ctas
    return min(min(warps_by_registers, sm.warps) // warps, by_shared, sm.ctas)
