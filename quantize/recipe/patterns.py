"""Names of linears may be given as globs, several in one string."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any

import re2

EXPRESSION = "re:"
GLOB = re.compile(r"[*?]")


@functools.lru_cache(4096)
def compiled(text: str) -> Any:
    """Compile a regular expression of RE2, whose matching takes time linear in the path, whatever the expression.

    Raises:
        re2.error: it is none, or takes more than 1 MiB. UnicodeEncodeError: it holds half a surrogate pair.
    """
    options = re2.Options()
    options.log_errors, options.never_capture, options.max_mem = False, True, 1 << 20
    return re2.compile(text, options)


def expand_patterns(values: Iterable[str]) -> Iterator[str]:
    """Yield each pattern of lists separated by commas; one with `*` or `?` becomes an expression for whole paths.

    As a plain name does, a glob matches a path or the end of one. An expression `re:…` stays as it is, commas included.
    """
    for value in values:
        if value.startswith(EXPRESSION):
            yield value
        else:
            yield from map(expression, filter(None, map(str.strip, value.split(","))))


def expression(pattern: str) -> str:
    """Return a pattern in which every `*` stands for any text and every `?` for a character."""
    if not GLOB.search(pattern):
        return pattern
    parts = (".*" if c == "*" else "." if c == "?" else re.escape(c) for c in pattern)
    return f"{EXPRESSION}(.*\\.)?{''.join(parts)}"
