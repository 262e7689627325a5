"""Errors written for people: what was found, what is allowed, what to do."""

from __future__ import annotations


class QuantizeError(Exception):
    """A failed run (exit code 1); the message is one sentence and needs no traceback."""


class UsageError(QuantizeError):
    """A wrong call: bad option, recipe or path (exit code 2)."""
