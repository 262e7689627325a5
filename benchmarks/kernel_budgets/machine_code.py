"""The machine code of a kernel, SASS or amdgcn, is read as text, and says much about the kernel's speed."""

from __future__ import annotations

import re
from dataclasses import dataclass

from benchmarks.kernel_budgets.compile_ahead import Compiled
from benchmarks.kernel_budgets.control_flow import loops
from benchmarks.kernel_budgets.dataflow import on_operands
from benchmarks.kernel_budgets.occupancy import resident

P = r"^(?:@!?U?P\w+ +)?"  # a predicate
INSTRUCTION = re.compile(P + r"(?:[A-Z]+[A-Z0-9]*\b|[vs]_|(?:global|buffer|flat|scratch|ds)_|\.L\w+:)")
MMA = re.compile(P + r"((?:I|H|IG|HG|Q|QG|O|UTC[A-Z]*)MMA\b\S*|v_s?mfma\w+)")
# Shifts, masks and byte permutations. IMAD.SHL is a shift that runs on the multipliers.
LOGIC = re.compile(
    r"(?:LOP3|LOP|PRMT|SHF|SHL|SHR|SGXT|BFE|BFI|IMAD\.SHL)\b"
    r"|v_(?:pk_)?(?:and|or|xor|not|lshl|lshr|ashr|bfe|bfi|perm|alignb|or3|xad)"
)
BYTE_SHUFFLE = re.compile(P + r"(?:PRMT\b|v_perm_)")
SPILL = re.compile(P + r"(?:(?:LDL|STL)\b|scratch_)")
LOAD = re.compile(P + r"((?:LDG|LDGSTS|UTMALDG|UBLKCP)\b\S*|(?:global|buffer|flat)_load_\w+)")
SASS_BITS = re.compile(r"\.(U8|S8|U16|S16|64|128)(?=\.|$)")
AMD_BITS = {
    "ubyte": 8, "sbyte": 8, "ushort": 16, "sshort": 16, "short": 16,
    "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128,
}  # fmt: skip


@dataclass(frozen=True)
class Figures:
    """The figures of a kernel that a budget holds.

    Attributes:
        mma: the matrix instruction of the main loop, "" if there is none.
        registers: the registers of each thread; on AMD, vector registers.
        spills: the number of instructions that move registers to or from local memory.
        shared: the bytes of shared memory of each CTA.
        ctas: the number of CTAs that fit an SM at once.
        mmas, instructions, byte_shuffles: their number in one iteration of the main loop, for each warp.
        logic: the number of shifts, masks and permutations of operands in it, for 8 weights; 0 if there are no weights.
        wide_loads: the number of its loads from global memory of 128 bits or by TMA.
        narrow_loads: the number of its narrower loads, without scale_loads.
        scale_loads: the number of its loads into registers of at most 32 bits.
    """

    mma: str
    registers: int
    spills: int
    shared: int
    ctas: int
    mmas: int
    instructions: int
    logic: float
    byte_shuffles: int
    wide_loads: int
    narrow_loads: int
    scale_loads: int


def figures(kernel: Compiled, weights: int) -> Figures:
    """Read the figures of a kernel.

    Args:
        kernel: the compiled kernel.
        weights: the weights that one CTA unpacks in one iteration of its main loop.
    """
    code = instructions(kernel.code)
    loop = main_loop(code)
    mmas = [found[1] for line in loop if (found := MMA.match(line))]
    loads = [found[1] for line in loop if (found := LOAD.match(line))]
    scale_loads = sum(load_bits(name) <= 32 and not name.startswith("LDGSTS") for name in loads)
    wide_loads = sum(load_bits(name) >= 128 for name in loads)
    logic = on_operands(loop, LOGIC.match) * kernel.threads
    return Figures(
        mma=mmas[0].replace(".SAT", "") if mmas else "",
        registers=kernel.registers,
        spills=spill_count(kernel.code, code),
        shared=kernel.shared,
        ctas=resident(kernel.arch, kernel.registers, kernel.shared, kernel.threads),
        mmas=len(mmas),
        instructions=len(loop),
        logic=round(logic / (weights / 8), 2) if weights else 0.0,
        byte_shuffles=count(BYTE_SHUFFLE, loop),
        wide_loads=wide_loads,
        narrow_loads=len(loads) - wide_loads - scale_loads,
        scale_loads=scale_loads,
    )


def instructions(code: str) -> list[str]:
    """Return instructions and labels, in order."""
    lines = (line.split(";")[0].strip() for line in code.splitlines())
    return [line for line in lines if INSTRUCTION.match(line)]


def main_loop(code: list[str]) -> list[str]:
    """Return the smallest loop with the most matrix instructions, or all of the code if there is none."""
    busy = [loop for loop in loops(code) if count(MMA, loop)]
    return min(busy, key=lambda loop: (-count(MMA, loop), len(loop)), default=code)


def count(pattern: re.Pattern[str], code: list[str]) -> int:
    """Count the instructions of a kind."""
    return sum(map(bool, map(pattern.match, code)))


def load_bits(name: str) -> int:
    """Return the bits that a thread loads by an instruction; a TMA instruction loads a tile and counts as 128."""
    if name.startswith(("UTMALDG", "UBLKCP")):
        return 128
    if "_load_" in name:
        return AMD_BITS[name.split("_load_")[1].split("_")[0]]
    found = SASS_BITS.search(name)
    return int(found[1].strip("US")) if found else 32


def spill_count(code: str, lines: list[str]) -> int:
    """Count the instructions that spill; on AMD at least the registers that the compiler says it spilled."""
    told = sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", code)))
    return max(told, count(SPILL, lines))
