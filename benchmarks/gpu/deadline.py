"""Measurements keep to a time: what is at work when it is over is given up, and what comes later is not begun."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from benchmarks.alarm import raising_after
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
            left = self.end - time.monotonic()
            if left <= 0:
                raise TimeOver
            with raising_after(left, TimeOver):
                return measure()
        except TimeOver:
            self.missed.append(name)
        except Exception as error:  # whatever fails, what was measured before is kept
            self.failures[name] = reason(error)
        return None
