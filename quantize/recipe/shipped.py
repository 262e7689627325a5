"""The recipes that come with the package; nothing slow is imported here."""

from __future__ import annotations

import itertools
from importlib import resources
from pathlib import Path

from quantize.errors import UsageError

FOLDER = resources.files("quantize.recipes")
SUFFIXES = (".toml", ".yaml", ".yml")


def names() -> list[str]:
    """Return the names of the shipped recipes."""
    return sorted(file.name.removesuffix(".toml") for file in FOLDER.iterdir() if file.name.endswith(".toml"))


def shipped(name: str) -> str:
    """Return the text of a shipped recipe.

    Raises:
        KeyError: there is no recipe of that name.
    """
    if name not in names():
        raise KeyError(name)
    return FOLDER.joinpath(f"{name}.toml").read_text()


def about(name: str) -> str:
    """Return the first sentence of the comment that a shipped recipe begins with."""
    comment = itertools.takewhile(lambda line: line.startswith("#"), shipped(name).splitlines())
    return " ".join(line.removeprefix("#").strip() for line in comment).partition(". ")[0].rstrip(".")


def require_recipe(path: Path) -> None:
    """Check that there is a recipe file, or a shipped recipe of this name.

    Raises:
        UsageError: there is neither.
    """
    if not (path.is_file() if path.suffix or path.exists() else str(path) in names()):
        raise UsageError(f"no such recipe: {path}; give a .toml or .yaml file, or one of {', '.join(names())}")
