"""Some instructions of a loop work on loaded operands, and others on addresses, counters and scales."""

from __future__ import annotations

import re
from collections.abc import Callable

REGISTERS = re.compile(r"\bR(\d+)\b|\bv(\d+)\b|\bv\[(\d+):(\d+)\]")
PREDICATE = re.compile(r"^@!?U?P\w+ +")
LOADS = re.compile(r"^LD|^(?:ds|global|buffer|flat)_(?:read|load)")
# Reads of shared and tensor memory, and wide reads of global memory, into registers; scales are narrow.
READS = re.compile(
    r"^(?:LDS|LDSM|LDTM|LDG\S*\.(?:64|128))\b|^(?:ds_read|ds_load|(?:global|buffer|flat)_load_dwordx[24])"
)
WIDE = re.compile(r"\.(64|128)\b|\.M88\.(\d)\b|\.x(\d+)\b")


def on_operands(loop: list[str], wanted: Callable[[str], object]) -> int:
    """Count instructions of a kind that read a register with a loaded operand, or with what was computed from one.

    Args:
        loop: the instructions; what one iteration leaves in registers is there in the next.
        wanted: returns whether an instruction is of the kind.
    """
    held: set[int] = set()
    found = 0
    for _ in range(2):  # in the second round, registers hold what they hold in the midst of a run
        found = 0
        for line in (PREDICATE.sub("", line) for line in loop):
            written, read = operands(line)
            on_held = any(register in held for register in read)
            found += bool(wanted(line)) and on_held
            holds = READS.match(line) if LOADS.match(line) else on_held  # a loaded value is not its address
            held = held | written if holds else held - written
    return found


def operands(line: str) -> tuple[set[int], list[int]]:
    """Return the registers that an instruction writes, assumed to be its first operand, and those that it reads."""
    name, _, rest = line.partition(" ")
    groups = [registers(found) for found in REGISTERS.finditer(rest)]
    first = rest.split(",")[0]
    if not groups or name.startswith(("ST", "RED", "LDGSTS", "ds_write", "buffer_store", "global_store")):
        return set(), [register for group in groups for register in group]
    if REGISTERS.search(first) is None:
        return set(), [register for group in groups for register in group]
    wide = WIDE.search(name) if READS.match(line) else None
    count = {"64": 2, "128": 4}.get(wide[1]) or int(wide[2] or wide[3]) if wide else 1
    written = set(groups[0]) | {groups[0][0] + more for more in range(count)}
    return written, [register for group in groups[1:] for register in group]


def registers(found: re.Match[str]) -> list[int]:
    """Return the numbers in `R7`, `v7` or `v[4:7]`."""
    if found[3]:
        return list(range(int(found[3]), int(found[4]) + 1))
    return [int(found[1] or found[2])]
