"""Errors written for people: what was found, what is allowed, what to do."""

from __future__ import annotations

import reprlib

LONGEST = 120  # characters of a value that a sentence shows


class QuantizeError(Exception):
    """A failed run (exit code 1); the message is one sentence and needs no traceback."""


class UsageError(QuantizeError):
    """A wrong call: bad option, recipe or path (exit code 2)."""


class ExportError(QuantizeError):
    """The exporter refuses a model.

    Attributes:
        reason: why, in its own words.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"the model cannot be exported as a graph: {reason}")
        self.reason = reason


def reason(error: BaseException) -> str:
    """The first line of somebody else's error, or two if the first announces the second, within a sentence of ours."""
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join([first, *rest[:1]]) if first.endswith(":") else first


def shown(value: object) -> str:
    """A value from outside within a sentence, cut where it is long."""
    limits = reprlib.Repr()
    limits.maxstring = limits.maxother = limits.maxlong = LONGEST
    return limits.repr(value)
