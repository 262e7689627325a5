"""What a target of exports is, and the registry of all: a target is a folder here, which registers itself."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from quantize.errors import UsageError

if TYPE_CHECKING:  # it imports torch, and `--help` answers without
    from quantize.export.outline import Outline


class Obstacle(NamedTuple):
    """Something of an artifact that a target cannot express.

    Attributes:
        reason: a clause that says what, and why not.
        remedy: a clause that says what to change: `quantize with …`.
    """

    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}"


@dataclass(frozen=True)
class Exporter:
    """A target.

    Attributes:
        name: what `--format` takes.
        summary: what is written and who reads it, in one line of `export --help`.
        options: of the command, each with its help; `export` takes them as keywords and has their defaults.
        obstacles: what of an artifact the target cannot express, before anything is written.
        export: writes an artifact's directory with a writer, whose side files are there already; returns what the
            manifest says of it, `parity` among it: how far the written model is from the artifact.
    """

    name: str
    summary: str
    options: tuple[click.Option, ...]
    obstacles: Callable[[Outline], Iterable[Obstacle]]
    export: Callable[..., dict[str, Any]]

    def check(self, outline: Outline) -> None:
        """Compare what an artifact is with what the target can express.

        Raises:
            UsageError: names all that it cannot, and what to change.
        """
        if found := [str(obstacle) for obstacle in self.obstacles(outline)]:
            raise UsageError("; ".join(found))


def lazy(module: str, name: str) -> Callable[..., Any]:
    """A function that is imported when it is called: `--help` lists targets before torch is imported."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return call


class Exporters(dict[str, Exporter]):
    """Targets by name."""

    def register(self, exporter: Exporter) -> None:
        """Enter a target under its name."""
        self[exporter.name] = exporter

    def find(self, name: str, options: Mapping[str, Any]) -> Exporter:
        """The target of a name, which takes the options that are given.

        Raises:
            UsageError: no target has the name, or an option belongs to others.
        """
        if name not in self:
            raise UsageError(f"there is no target {name!r}; known are {', '.join(sorted(self))}")
        own = {option.name for option in self[name].options}
        for option in options.keys() - own:
            owners = [target for target, other in sorted(self.items()) if option in {o.name for o in other.options}]
            belongs = f"belongs to --format {' and '.join(owners)}" if owners else "belongs to no target"
            raise UsageError(f"--{option.replace('_', '-')} {belongs}, not to {name}; leave it out")
        return self[name]


EXPORTERS = Exporters()
