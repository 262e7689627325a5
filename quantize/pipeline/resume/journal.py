"""A journal records what a run has finished, block by block, so that a killed run can go on.

A run works in `.OUT.partial` beside its output OUT: the artifact grows in one folder of it, the journal in another.
The journal holds the run's fingerprint (`identity`) and the state at the border after the last finished block:
calibration activations, probes and transforms. A new state is written beside the old one, flushed and renamed, so that
there is always a complete one. The files do not depend on how many processes share the work: there is one file of
activations for each batch.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from quantize.artifact.writer import ArtifactWriter, as_json, flush, translate_disk_errors
from quantize.errors import QuantizeError, UsageError
from quantize.pipeline.distributed import SingleProcess
from quantize.pipeline.fingerprint import MACHINE, Fingerprint, diff_fingerprints
from quantize.pipeline.resume.block_state import Resumable, plain_values, restore_files, values_of
from quantize.pipeline.serialization import contiguous, load_state, save_state

T = TypeVar("T")
SHORT = 2.0  # seconds that may always be spent on storing the state
PART_OF_TIME = 0.1  # of a run's time that is spent on storing it, if that takes longer
ROTATIONS, GRIDS = "rotations", "grids"  # found in little time, so that they alone are no result
DAMAGE = (QuantizeError, OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError, AttributeError)


@dataclass
class Pace:
    """When the state was stored last, and how many seconds it took: what takes long is not stored after each block."""

    seconds: float = 0.0
    ended: float = 0.0

    def due(self) -> bool:
        """Return whether storing the state anew takes a small part of the time that has gone by since."""
        return self.seconds < SHORT or time.monotonic() - self.ended >= self.seconds / PART_OF_TIME

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Note how long the body takes."""
        start = time.monotonic()
        yield
        self.ended = time.monotonic()
        self.seconds = self.ended - start


@dataclass(frozen=True)
class Journal:
    """A journal in a directory; messages name `output`, which is what the run makes."""

    directory: Path
    output: Path
    ranks: SingleProcess = field(default_factory=SingleProcess)
    pace: Pace = field(default_factory=Pace)

    def begin(self, found: Fingerprint, force: bool = False) -> None:
        """Record the run's fingerprint, or compare it with the one that the run was started with.

        With `force` the machine may be another one, whose fingerprint is then recorded as well.

        Raises:
            UsageError: something has changed since; the message names it.
        """
        path = self.directory / "identity.json"
        if not path.exists():
            return self._write_atomically(path, lambda temporary: temporary.write_text(as_json(found)))
        with translate_damage(self.directory.parent):
            before = json.loads(path.read_text())
            changed = diff_fingerprints(before, found)
            moved = bool(changed) and not diff_fingerprints(before | {MACHINE: found[MACHINE]}, found)
        if changed and not (moved and force):
            forced = ", add --force to go on here with other bytes" if moved else ""
            raise UsageError(
                f"{' and '.join(changed)} changed since the run in {self.directory.parent} was started; go on with "
                f"what it was started with{forced}, or remove that directory to start again"
            )
        if changed:
            begun = [*before.get("begun on", []), before[MACHINE]]
            self._write_atomically(path, lambda temporary: temporary.write_text(as_json({**found, "begun on": begun})))
        return None

    @property
    def begun_on(self) -> list[dict[str, str]]:
        """The machines on which the run was begun and gone on with before this one."""
        found: list[dict[str, str]] = json.loads((self.directory / "identity.json").read_text()).get("begun on", [])
        return found

    @property
    def has_results(self) -> bool:
        """Whether a block is finished, or statistics of the whole model are."""
        files = (path for path in self.directory.iterdir() if path.suffix != ".part")
        return any(path.stem not in ("identity", ROTATIONS, GRIDS) for path in files)

    def cached(self, name: str, make: Callable[[], T], device: torch.device, /) -> T:
        """Return what `make` returned, now or before the run was killed; `save_state` must know its type."""
        path = self.directory / f"{name}.safetensors"
        if not path.exists():
            made: T = contiguous(make())
            if self.ranks.is_rank_zero:
                self._write_atomically(path, lambda temporary: save_state(temporary, made))
            return made
        with translate_damage(self.directory.parent):
            return load_state(path, device)  # type: ignore[no-any-return]

    def store_block(self, done: int, blocks: Resumable) -> Path | None:
        """Store the state after block number `done` if that is due, and return where it counts once it is noted.

        Only the first rank stores the state that all ranks share.
        """
        if not self.ranks.gather(self.pace.due())[0]:
            return None
        path = self.directory / f"border-{done:05}"
        with self.pace.timed(), translate_disk_errors(self.output):
            if self.ranks.is_rank_zero:
                shutil.rmtree(temporary_name(path), ignore_errors=True)
                temporary_name(path).mkdir()
                save_state(temporary_name(path) / "state.safetensors", blocks.state_dict())
            self.ranks.gather(None)  # now the folder is there for all ranks
            self._write_values(temporary_name(path), done, blocks)
            self.ranks.gather(None)  # now all ranks have written
        return path

    def note(self, path: Path, writer: ArtifactWriter) -> None:
        """Note that a block is on disk, by the state behind it that `store_block` stored; remove the border before it.

        A thread may do so while the next block is at work.
        """
        before = self._borders()
        with translate_disk_errors(self.output):
            files = as_json({"weight_map": writer.weight_map, "hashes": writer.hashes})
            (temporary_name(path) / "files.json").write_text(files)
            self._rename(path)
        for old in before:
            shutil.rmtree(old)

    def _write_values(self, folder: Path, done: int, blocks: Resumable) -> None:
        """Write this rank's activations; only the first rank writes those that all ranks have, as of the probes."""
        last = not blocks.calibrates_after(blocks.program.segments[done - 1])  # after it calibration data does not run
        for name, runner, first in blocks.runners():
            own = name in ("calibration", "float_reference")
            for number, values in enumerate(runner.values if own or self.ranks.is_rank_zero else [], first):
                kept = plain_values({} if last and own else values, blocks.program)
                save_state(folder / f"{name}-{number:05}.safetensors", kept)

    def load_last_block(self, blocks: Resumable, writer: ArtifactWriter | None) -> int:
        """Restore a run as it was after the last finished block; remove files that were written but not recorded.

        Returns:
            The number of finished blocks.

        Raises:
            QuantizeError: a file is missing or damaged.
        """
        borders = self._borders()
        files: dict[str, dict[str, str]] = {"weight_map": {}, "hashes": {}}
        if borders:
            with translate_damage(self.directory.parent):
                state = load_state(borders[-1] / "state.safetensors", blocks.program.device)
                files = json.loads((borders[-1] / "files.json").read_text())
                blocks.load_state_dict(state)
                for name, runner, first in blocks.runners():
                    for number in range(len(runner.values)):
                        stored = borders[-1] / f"{name}-{first + number:05}.safetensors"
                        plain = load_state(stored, blocks.program.device)
                        runner.values[number] = values_of(plain, blocks.program)
        if writer:
            restore_files(writer, **files)
        return int(borders[-1].name.removeprefix("border-")) if borders else 0

    def _borders(self) -> list[Path]:
        return sorted(path for path in self.directory.glob("border-*") if not path.suffix)

    def _write_atomically(self, path: Path, write: Callable[[Path], object]) -> None:
        """Write a file under a temporary name, flush it, and rename it."""
        with translate_disk_errors(self.output):
            write(temporary_name(path))
            self._rename(path)

    def _rename(self, path: Path) -> None:
        """Flush what was written under the temporary name, and rename it."""
        for written in [*temporary_name(path).rglob("*"), temporary_name(path)]:
            flush(written)
        temporary_name(path).rename(path)
        flush(self.directory)


@contextlib.contextmanager
def translate_damage(partial: Path) -> Iterator[None]:
    """Turn an error in a stored file into one sentence."""
    try:
        yield
    except DAMAGE as error:
        raise QuantizeError(
            f"the journal in {partial} is damaged ({error!r}); remove that directory to start again"
        ) from error


def temporary_name(path: Path) -> Path:
    """Return the name under which a file is written until it is complete."""
    return path.with_name(f"{path.name}.part")
