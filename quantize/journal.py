"""What a run has done, block by block, so that a killed one goes on where it was.

A run works in `.OUT.partial` beside its output OUT: the artifact grows in one folder of it, the journal in another.
The journal holds what the run depends on (`identity`) and what is alive at the border behind the last finished block:
calibration activations, probes, transforms. It is written beside, flushed and renamed, so there is always a whole one.
What is stored does not depend on how many processes share the work: activations lie in one file for each batch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from torch import fx

from quantize.artifact import ArtifactWriter, as_json, disk_errors, flush, sha256
from quantize.blocks import BlockRun
from quantize.calibration.runner import Runner
from quantize.errors import QuantizeError, UsageError
from quantize.graph.execute import Values
from quantize.graph.program import Program
from quantize.identity import Identity, changes
from quantize.once import always
from quantize.ranks import Ranks
from quantize.stored import read_stored, write_stored

T = TypeVar("T")
DAMAGE = (SafetensorError, OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError, AttributeError)


class Journal:
    """A run that keeps nothing; `KeptJournal` does."""

    def once(self, name: str, make: Callable[[], T], /) -> T:
        """What `make` gives, found only once in the life of a run."""
        return always(name, make)

    def restore(self, blocks: BlockRun, writer: ArtifactWriter) -> int:
        """Bring a run behind the last finished block; returns how many blocks are finished."""
        del blocks, writer
        return 0

    def record(self, done: int, blocks: BlockRun, writer: ArtifactWriter) -> None:
        """Keep that so many blocks are finished and written."""
        del done, blocks, writer


@dataclass(frozen=True)
class KeptJournal(Journal):
    """A journal in a directory; `output` is what the run makes, for messages."""

    directory: Path
    output: Path
    ranks: Ranks = field(default_factory=Ranks)

    def begin(self, found: Identity) -> None:
        """Start with what the run depends on, or compare it with what the run was started with.

        Raises:
            UsageError: names what has changed since.
        """
        path = self.directory / "identity.json"
        if not path.exists():
            return self._place(path, lambda beside: beside.write_text(as_json(found)))
        with self._damage():
            before = json.loads(path.read_text())
            changed = changes(before, found)
        if changed:
            raise UsageError(
                f"{' and '.join(changed)} changed since the run in {self.directory.parent} was started; go on with "
                "what it was started with, or remove that directory to start again"
            )
        return None

    def once(self, name: str, make: Callable[[], T], /) -> T:
        """What `make` gave in this run or the one that it continues; see `stored` for what can be kept."""
        path = self.directory / f"{name}.safetensors"
        if not path.exists():
            made = make()
            if self.ranks.first:
                self._place(path, lambda beside: write_stored(beside, made))
            return made
        with self._damage():
            return read_stored(path)  # type: ignore[no-any-return]

    def record(self, done: int, blocks: BlockRun, writer: ArtifactWriter) -> None:
        """Store what is alive behind block number `done`, then forget the border before it."""
        before, path = self._borders(), self.directory / f"border-{done:05}"
        with disk_errors(self.output):
            if self.ranks.first:
                self._write_state(beside(path), blocks, writer)
            self.ranks.gather(None)  # the folder is there
            self._write_values(beside(path), done, blocks)
            self.ranks.gather(None)  # all have written
            if self.ranks.first:
                self._rename(path)
        for old in before if self.ranks.first else []:
            shutil.rmtree(old)

    def _write_state(self, folder: Path, blocks: BlockRun, writer: ArtifactWriter) -> None:
        """What all ranks share, in a new folder."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        state = state_of(blocks) | {"files": [writer.weight_map, writer.hashes]}
        write_stored(folder / "state.safetensors", state)

    def _write_values(self, folder: Path, done: int, blocks: BlockRun) -> None:
        """What this rank has alive; of the probes, which all have, the first rank's."""
        last = not blocks.calibrates_after(blocks.program.segments[done - 1])  # behind it only probes run
        for name, runner, first in runners(blocks):
            for number, values in enumerate(runner.values if name != "probes" or self.ranks.first else [], first):
                kept = plain_values({} if last and name != "probes" else values, blocks.program)
                write_stored(folder / f"{name}-{number:05}.safetensors", kept)

    def restore(self, blocks: BlockRun, writer: ArtifactWriter) -> int:
        """As `Journal.restore`; what was written but not recorded is removed.

        Raises:
            QuantizeError: a file is missing or damaged.
        """
        borders = self._borders()
        files: list[dict[str, str]] = [{}, {}]
        if borders:
            with self._damage():
                state = read_stored(borders[-1] / "state.safetensors")
                files = state.pop("files")
                restore_state(blocks, state)
                for name, runner, first in runners(blocks):
                    for number in range(len(runner.values)):
                        plain = read_stored(borders[-1] / f"{name}-{first + number:05}.safetensors")
                        runner.values[number] = values_of(plain, blocks.program)
        if self.ranks.first:
            restore_files(writer, *files)
        return int(borders[-1].name.removeprefix("border-")) if borders else 0

    def _borders(self) -> list[Path]:
        return sorted(path for path in self.directory.glob("border-*") if not path.suffix)

    def _place(self, path: Path, write: Callable[[Path], object]) -> None:
        """Write a file beside its place, flush it, and rename it."""
        with disk_errors(self.output):
            write(beside(path))
            self._rename(path)

    def _rename(self, path: Path) -> None:
        """Flush what lies beside its place, and rename it."""
        for written in [*beside(path).rglob("*"), beside(path)]:
            flush(written)
        beside(path).rename(path)
        flush(self.directory)

    def _damage(self) -> damaged:
        return damaged(self.directory.parent)


class damaged:  # noqa: N801  a context manager, used like a function
    """Turn what is wrong with a stored file into one sentence."""

    def __init__(self, partial: Path) -> None:
        self.partial = partial

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, DAMAGE):
            raise QuantizeError(
                f"the journal in {self.partial} is damaged ({error!r}); remove that directory to start again"
            ) from error


def beside(path: Path) -> Path:
    """Where something is written before it is whole."""
    return path.with_name(f"{path.name}.part")


def runners(blocks: BlockRun) -> list[tuple[str, Runner, int]]:
    """All that is on its way through the blocks, and the number of its first batch among those of all ranks."""
    first = blocks.first_batch
    return [("calibration", blocks.calibration, first), ("exact", blocks.exact, first), ("probes", blocks.probes, 0)]


def plain_values(values: Values, program: Program) -> dict[str, Any]:
    """Values by the name of their node; None for what the program itself holds."""
    return {node.name: {} if held(node, program) else {"value": value} for node, value in values.items()}


def values_of(plain: dict[str, Any], program: Program) -> Values:
    """What `plain_values` was given."""
    nodes = {node.name: node for node in program.module.graph.nodes}
    return {nodes[name]: kept.get("value", held_value(nodes[name], program)) for name, kept in plain.items()}


def held(node: fx.Node, program: Program) -> bool:
    """Whether the program itself holds a node's value."""
    return node in program.constants or node.op == "get_attr"


def held_value(node: fx.Node, program: Program) -> Any:
    """That value, None if it holds none."""
    if node.op == "get_attr":
        return program.module.get_submodule(str(node.target))
    return program.constants.get(node)


def state_of(blocks: BlockRun) -> dict[str, Any]:
    """What else a run carries across a border."""
    transformer = blocks.transformer
    sites = [{basis.index: transform for basis, transform in made.items()} for made in transformer.sites]
    return {
        "modules": blocks.modules,
        "untied": blocks.ties.untied,
        "tied": blocks.ties.stored,
        "sites": sites,
        "differences": transformer.differences,
        "changed": transformer.changed,
    }


def restore_state(blocks: BlockRun, state: dict[str, Any]) -> None:
    """The reverse of `state_of`."""
    transformer = blocks.transformer
    blocks.modules, blocks.ties.untied, blocks.ties.stored = state["modules"], state["untied"], state["tied"]
    transformer.differences, transformer.changed = state["differences"], state["changed"]
    for step, made, sites in zip(transformer.steps, state["sites"], transformer.sites, strict=True):
        bases = {basis.index: basis for basis in step.sites}
        sites.update({bases[index]: transform for index, transform in made.items()})


def restore_files(writer: ArtifactWriter, weight_map: dict[str, str], hashes: dict[str, str]) -> None:
    """Take over the files that were recorded, unchanged, and remove all others."""
    for path in [path for path in writer.directory.iterdir() if path.name not in hashes]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, digest in hashes.items():
        if not (writer.directory / name).is_file() or sha256(writer.directory / name) != digest:
            raise QuantizeError(
                f"{writer.directory / name} is not as it was written; remove {writer.directory.parent} to start again"
            )
    writer.weight_map, writer.hashes = weight_map, hashes
