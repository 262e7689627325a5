"""The examples of a page of documentation: commands, and what they print."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")


@dataclass(frozen=True)
class Example:
    """A command, and the lines that it prints; "…" stands for the rest of a line, or alone for any lines."""

    arguments: list[str]
    printed: list[str]


def console_examples(page: Path) -> list[Example]:
    """Return the examples of the blocks marked `console`, in order."""
    found = []
    for block in re.findall(r"(?ms)^```console\n(.*?)^```$", page.read_text()):
        for part in re.split(r"(?m)^\$ ", block)[1:]:
            command, *printed = part.rstrip("\n").split("\n")
            found.append(Example(shlex.split(command), printed))
    return found


def python_blocks(page: Path) -> list[str]:
    """Return the blocks marked `python`, in order."""
    return re.findall(r"(?ms)^```python\n(.*?)^```$", page.read_text())


def commands(page: Path) -> list[list[str]]:
    """Return the arguments of every `quantize-model` command in a block of code, up to a comment."""
    blocks = re.findall(r"(?ms)^```.*?$(.*?)^```$", page.read_text().replace("\\\n", " "))
    return [
        shlex.split(line, comments=True)
        for block in blocks
        for line in re.findall(r"(?m)^(?:\$ )?quantize-model (.*)$", block)
    ]


def difference(expected: list[str], printed: list[str]) -> str:
    """Return the first line that was not printed in its place, or ''; numbers may differ by a hundredth or by 0.002."""
    rest, free = list(printed), False
    for line in expected:
        if line.strip() == "…":
            free = True
            continue
        at = next((n for n, found in enumerate(rest) if alike(line, found)), None)
        if at is None or (at and not free):
            return f"{line!r} is not what was printed: {rest[:5]}"
        rest, free = rest[at + 1 :], False
    return "" if free or not [line for line in rest if line.strip()] else f"more was printed: {rest[:5]}"


def alike(expected: str, printed: str) -> bool:
    """Return whether a line says what it is to say, up to its "…"."""
    head, more, _ = expected.rstrip().partition("…")
    apart = [(NUMBER.split(line), NUMBER.findall(line)) for line in (head, printed.rstrip())]
    (words, numbers), (found, values) = apart
    if more:
        found, values = found[: len(words)], values[: len(numbers)]
        found[-1:] = [found[-1][: len(words[-1])]] if found else []
    return words == found and all(map(near, numbers, values)) and len(numbers) == len(values)


def near(expected: str, found: str) -> bool:
    """Return whether two numbers are equal within a hundredth or 0.002, which processors differ by."""
    a, b = (float(x.replace(",", "")) for x in (expected, found))
    return abs(a - b) <= max(0.01 * abs(a), 0.002)
