"""What a run computes, counted, and the time it takes at the rates that were measured of a machine.

Counted are multiply-adds of matrix products (in float32, and as models that are stored in bfloat16 are calibrated),
float32 numbers that are changed one by one, in new memory and in a core's cache, calls of operators, and small files
written through to the disk.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

from quantize.pipeline.estimate.machine import Machine

WARM = 10  # how much longer than in a core's cache a number takes where the process has used the memory before
NEW = 1 << 25  # bytes; glibc asks the system for the memory of larger tensors anew each time, and pages come as touched


@dataclass(frozen=True)
class Work:
    """Counts of multiply-adds, numbers in new memory and in a cache, operators and files."""

    products: float = 0.0
    elements: float = 0.0
    operators: float = 0.0
    files: float = 0.0
    sums: float = 0.0
    rounded: float = 0.0
    cached: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def times(self, count: float) -> Self:
        """So often."""
        return type(self)(*(getattr(self, f.name) * count for f in fields(self)))

    @property
    def multiply_adds(self) -> float:
        """Of all products."""
        return self.products + self.sums + self.rounded

    def seconds(self, machine: Machine) -> float:
        """At the rates of a machine."""
        products = self.products / machine.products + self.sums / machine.sums + self.rounded / machine.rounded
        numbers = self.elements / machine.elements + self.cached / machine.cached
        return products + numbers + self.operators * machine.operator + self.files * machine.file


def passes(numbers: float, each: float) -> Work:
    """So many numbers changed, in tensors of `each`."""
    return Work(elements=numbers) if 4 * each > NEW else Work(cached=WARM * numbers)
