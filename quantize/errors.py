"""Errors written for people: what was found, what is allowed, what to do."""

from __future__ import annotations

import reprlib

LONGEST = 120  # characters of a value that a sentence shows


class QuantizeError(Exception):
    """A run has failed (exit code 1). The message is one sentence and needs no traceback."""


class UsageError(QuantizeError):
    """The caller gave a wrong option, recipe or path (exit code 2)."""


class ChangedError(QuantizeError):
    """Files changed while a run read them, so that what was made of them is worth nothing."""


class ExportError(QuantizeError):
    """The exporter refuses a model.

    Attributes:
        reason: the reason in the exporter's own words.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"the model cannot be exported as a graph: {reason}")
        self.reason = reason


def reason(error: BaseException) -> str:
    """Return the first line of another library's error, to use in a sentence; two lines if it ends in a colon."""
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join([first, *rest[:1]]) if first.endswith(":") else first


def shown(value: object) -> str:
    """Return a value that came from outside for use in a sentence; a long one is cut."""
    limits = reprlib.Repr()
    limits.maxstring = limits.maxother = limits.maxlong = LONGEST
    return limits.repr(value)
