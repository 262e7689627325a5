"""Which modules a pattern matches, and what a person meant whose pattern matches none."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Any

import re2

from quantize.errors import LONGEST, UsageError, reason, shown

EXPRESSION = "re:"
TABLE = "table of words or linear that scores the vocabulary"
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


def matches(pattern: str, path: str) -> bool:
    """Return whether a pattern matches a path: the path, its end, or `re:` and an expression for all of it."""
    if pattern.startswith(EXPRESSION):
        return compiled(pattern[len(EXPRESSION) :]).fullmatch(path) is not None
    return path == pattern or path.endswith(f".{pattern}")


def require_match(kind: str, pattern: str, paths: list[str], what: str = "linear") -> None:
    """Check that a pattern matches one of some modules; the error says of what kind they are and lists the nearest."""
    require_expression(kind, pattern)
    if not any(matches(pattern, path) for path in paths):
        raise no_match(kind, pattern, pattern, [*paths, *(path.rpartition(".")[2] for path in paths)], what)


def require_possible(kind: str, pattern: str, parts: Set[str], words: Set[str], what: str = "linear") -> None:
    """Check that a pattern, with or without `*` and `?`, may match a module; of expressions little can be said.

    Args:
        kind: where the pattern stands.
        pattern: the pattern.
        parts: what stands between the dots of tensors' names; nothing if that is not known.
        words: what the model's class may call modules besides.
        what: of what kind the modules are.
    """
    require_expression(kind, pattern)
    for part in pattern.split(".") if parts and not pattern.startswith(EXPRESSION) else ():
        if not (part.isdigit() or GLOB.search(part) or part in parts or {part, part.rstrip("0123456789")} & words):
            raise no_match(kind, pattern, part, sorted(parts), what)


def require_expression(kind: str, pattern: str) -> None:
    """Check that what a pattern says is an expression is one.

    Raises:
        UsageError: it is none.
    """
    if not pattern.startswith(EXPRESSION):
        return
    try:
        compiled(pattern[len(EXPRESSION) :])
    except (re2.error, UnicodeEncodeError) as error:
        why = error.args[0].decode()[:LONGEST] if isinstance(error, re2.error) else reason(error)
        raise UsageError(
            f"{kind}: {shown(pattern)} is no regular expression of RE2, which has no look-around and no "
            f"back-references: {why}"
        ) from None


def no_match(kind: str, pattern: str, part: str, paths: Sequence[str], what: str) -> UsageError:
    """Return the error of a pattern that matches nothing, with what is nearest to the part that is wrong."""
    known = list(dict.fromkeys(paths))
    near = difflib.get_close_matches(part, known, n=3, cutoff=0.4) or known[:3]
    return UsageError(f"{kind}: {shown(pattern)} matches no {what}; near are {', '.join(near) or 'none'}")


def expand_patterns(values: Iterable[str]) -> Iterator[str]:
    """Yield each pattern of lists separated by commas; one with `*` or `?` becomes an expression for whole paths.

    As a plain name does, a glob matches a path or the end of one. An expression `re:…` stays as it is.
    """
    for pattern in split_patterns(values):
        yield pattern if pattern.startswith(EXPRESSION) else expression(pattern)


def split_patterns(values: Iterable[str]) -> Iterator[str]:
    """Yield each pattern of lists separated by commas; an expression `re:…` keeps its commas."""
    for value in values:
        yield from [value] if value.startswith(EXPRESSION) else filter(None, map(str.strip, value.split(",")))


def expression(pattern: str) -> str:
    """Return a pattern in which every `*` stands for any text and every `?` for a character."""
    if not GLOB.search(pattern):
        return pattern
    parts = (".*" if c == "*" else "." if c == "?" else re.escape(c) for c in pattern)
    return f"{EXPRESSION}(.*\\.)?{''.join(parts)}"
