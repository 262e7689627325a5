"""Measurements keep to a time: what is at work when it is over is given up, and what comes later is not begun."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from quantize.errors import reason

T = TypeVar("T")


class TimeOver(BaseException):
    """The time is over; what catches errors does not catch this."""


class Deadline:
    """So many seconds from now on.

    Attributes:
        missed: what was asked for and not measured as the time was over.
        failures: what failed, with the error.
    """

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.missed, self.failures = list[str](), dict[str, str]()

    def measured(self, name: str, measure: Callable[[], T]) -> T | None:
        """Return what a function of the main thread measures; None if its time is over before, or if it fails."""
        try:
            with alarm_after(self.end - time.monotonic()):
                return measure()
        except TimeOver:
            self.missed.append(name)
        except Exception as error:  # whatever fails, what was measured before is kept
            self.failures[name] = reason(error)
        return None


@contextmanager
def alarm_after(seconds: float) -> Iterator[None]:
    """Raise `TimeOver` in the main thread, within the context, after so many seconds."""

    def ring(*_: object) -> None:
        raise TimeOver

    if seconds <= 0:
        raise TimeOver
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
