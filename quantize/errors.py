"""Errors written for people: what was found, what is allowed, what to do."""

from __future__ import annotations

import itertools
import logging
import reprlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

LONGEST = 120  # characters of a value that a sentence shows
LONGEST_REASON = 1000  # characters of another library's error, which may hold a whole config
LOG = logging.getLogger("quantize")  # at the level DEBUG it has other libraries' errors in their own words


class QuantizeError(Exception):
    """A run has failed (exit code 1). The message is one sentence and needs no traceback."""


class UsageError(QuantizeError):
    """The caller gave a wrong option, recipe or path (exit code 2)."""


class ChangedError(QuantizeError):
    """Files changed while a run read them, so that what was made of them is worth nothing."""


class ExportError(QuantizeError):
    """The exporter refuses a model.

    Attributes:
        reason: the reason as a clause.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"the model cannot be exported as a graph: {reason}")
        self.reason = reason


def reason(error: BaseException) -> str:
    """Return the first line of another library's error, to use in a sentence; two lines if it ends in a colon."""
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    clause = " ".join([first, *rest[:1]]) if first.endswith(":") else first
    return clause if len(clause) <= LONGEST_REASON else f"{clause[:LONGEST_REASON]}…"


def log_own_words(error: BaseException) -> None:
    """Log the errors of other libraries from which one was raised, as they are, for `--verbose`."""
    while (error := error.__cause__) is not None:  # type: ignore[assignment]
        LOG.debug("%s: %s", type(error).__name__, error)


@contextmanager
def own_words_shown(show: bool = True) -> Iterator[None]:
    """Write to the standard error stream, within the context, what other libraries say where something fails."""
    handler, before = logging.StreamHandler(sys.stderr), LOG.level
    if not show:
        yield
        return
    LOG.addHandler(handler)
    LOG.setLevel(logging.DEBUG)
    try:
        yield
    except QuantizeError as error:
        log_own_words(error)
        raise
    finally:
        LOG.removeHandler(handler)
        LOG.setLevel(before)


def listed(names: Iterable[object]) -> str:
    """Return names that came from outside, separated by commas, for use in a sentence; a long list is cut."""
    text = ", ".join(str(name)[:LONGEST] for name in itertools.islice(names, LONGEST))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def shown(value: object) -> str:
    """Return a value that came from outside for use in a sentence; a long one is cut."""
    limits = reprlib.Repr()
    limits.maxstring = limits.maxother = limits.maxlong = LONGEST
    return limits.repr(value)
