"""The process returns memory that it no longer needs."""

from __future__ import annotations

import ctypes


def trim_heap() -> None:
    """Return freed memory to the system, because glibc keeps the holes between blocks that are still in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
