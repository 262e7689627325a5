"""A `with` block is interrupted after some time."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def raising_after(seconds: float, error: type[BaseException], of_a_core: bool = False) -> Iterator[None]:
    """Raise an error in the main thread, within the context, after so many seconds on the clock or of a core."""
    timer, number = (signal.ITIMER_PROF, signal.SIGPROF) if of_a_core else (signal.ITIMER_REAL, signal.SIGALRM)

    def late(*_: object) -> None:
        raise error

    before = signal.signal(number, late)
    signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        signal.setitimer(timer, 0)
        signal.signal(number, before)
