"""An exporter writes artifacts for one target. Each target is a folder here, which registers its exporter."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from quantize.errors import UsageError

if TYPE_CHECKING:  # it imports torch, which `--help` does not need
    from quantize.export.outline import Outline


ROTATION = ("a rotation of activations", "`online_hadamard = false` in the pass that rotates")
ONLINE = {  # kind of an online transform → what it is to a format without a place for it, and what to quantize with
    "hadamard": ROTATION,
    "dual": ROTATION,
    "blocks": ("a matrix in front of linears", "no pass `wush`"),
    "shift": ("a bias on what is rounded", "no pass `noisy_bias`"),
}


class Obstacle(NamedTuple):
    """A part of an artifact that a target cannot express.

    Attributes:
        reason: a clause that says what this is, and why the target cannot express it.
        remedy: a clause that says what to change, such as `quantize with …`.
    """

    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}"


@dataclass(frozen=True)
class Exporter:
    """The export to one target.

    Attributes:
        name: the value that `--format` takes.
        summary: what is written and what it is for, as one line of `export --help`.
        options: the command's options for this target, each with its help; `export` takes them as keywords and has
            their defaults.
        obstacles: yields what the target cannot express of an artifact, before anything is written.
        not_executed: returns why a runtime, a name in `TARGETS`, does not execute what the target can express; else "".
        export: writes the artifact in a directory with a writer that has the side files already, and shows progress on
            a console or, with None, nowhere; returns the manifest's entries, of which `parity` says how far the written
            model is from the artifact. Of a language model it has `kl` and `top1` where they are measured.
    """

    name: str
    summary: str
    options: tuple[click.Option, ...]
    obstacles: Callable[[Outline], Iterable[Obstacle]]
    export: Callable[..., dict[str, Any]]
    not_executed: Callable[[str, Outline], str] = lambda *_: ""

    def check(self, outline: Outline) -> None:
        """Check that the target can express an artifact.

        Raises:
            UsageError: it cannot; the message names all obstacles, and what to change.
        """
        if found := self.refusals(outline):
            raise UsageError("; ".join(found))

    def refusals(self, outline: Outline) -> list[str]:
        """Return what the target cannot express, each with what to change."""
        return [str(obstacle) for obstacle in self.obstacles(outline)]


def lazy(module: str, name: str) -> Callable[..., Any]:
    """Return a function that is imported when it is called, so that `--help` lists targets without torch."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return call


class Exporters(dict[str, Exporter]):
    """The exporters by name."""

    def register(self, exporter: Exporter) -> None:
        """Add an exporter under its name."""
        self[exporter.name] = exporter

    def find(self, name: str, options: Mapping[str, Any]) -> Exporter:
        """Return the exporter of a name, if it takes the given options.

        Raises:
            UsageError: no target has the name, or an option belongs to other targets.
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
