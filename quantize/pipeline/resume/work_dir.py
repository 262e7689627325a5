"""A run works in a directory that outlives a killed process, so that `--resume` finds it."""

from __future__ import annotations

import fcntl
import os
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from quantize.artifact.writer import ArtifactWriter, remove, translate_disk_errors
from quantize.checkpoint.outputs import partial_directory, require_resumable
from quantize.checkpoint.remote_shards import RemoteShards
from quantize.errors import ChangedError, UsageError
from quantize.pipeline.distributed import SingleProcess
from quantize.pipeline.fingerprint import Fingerprint
from quantize.pipeline.resume.journal import Journal


class ResumableWriter(ArtifactWriter):
    """A writer that works in `.OUT.partial` beside the output OUT.

    A killed process leaves the directory behind. So does an error once something is finished that took time, and a note
    on the error says how to go on; an error before that leaves nothing, unless `resume` is given, and so does one that
    says that the model's files have changed.

    Attributes:
        finished: whether the resumed run was killed when only its journal was left to remove.

    Raises:
        UsageError: the output exists already; or a killed run is there and `resume` is not given; or another run works
            there.
        QuantizeError: the disk is full or not writable.
    """

    def __init__(self, output: Path, resume: bool = False) -> None:
        self.partial, self.resume = partial_directory(output), resume
        self.journal = Journal(self.partial / "journal", output)
        self.finished = resume and output.is_dir() and self._began() and not (self.partial / "artifact").exists()
        if self.finished:
            self.output = output
        else:
            if resume:
                require_resumable(output)
            super().__init__(output)

    def __enter__(self) -> Self:
        with translate_disk_errors(self.output):
            self.partial.mkdir(exist_ok=True)
        self._lock()
        if self._began() and not self.resume:
            os.close(self.locked)
            raise UsageError(
                f"{self.partial} holds a run that was killed; give --resume to go on with it, or remove that directory"
            )
        self.directory, self.weight_map, self.hashes = self.partial / "artifact", {}, {}
        if not self.finished:
            with translate_disk_errors(self.output):
                self.journal.directory.mkdir(exist_ok=True)
                self.directory.mkdir(exist_ok=True)
        return self

    def begin(self, found: Fingerprint, ranks: SingleProcess, force: bool = False) -> Journal:
        """Begin or continue the journal of this run; with `force`, also where another machine began it.

        Raises:
            UsageError: the run to be resumed has another fingerprint.
        """
        self.journal.begin(found, force)
        ranks.gather(None)  # from here on other ranks find it by `join_journal`
        return replace(self.journal, ranks=ranks)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        worthless = self.is_complete(error) or error is None or isinstance(error, ChangedError)
        if not worthless and self._began() and (self.resume or self.journal.has_results):
            if error is not None and not isinstance(error, UsageError):  # which the same command would meet again
                go_on = "the same command again" if self.resume else "the same command with --resume"
                error.add_note(
                    f"{self.partial} keeps what is finished; give {go_on} to go on, or remove that directory"
                )
        else:
            remove(self.partial)
        os.close(self.locked)

    def _began(self) -> bool:
        return (self.journal.directory / "identity.json").exists()

    def _lock(self) -> None:
        """Let no other process work here; the lock ends with the process, however that ends."""
        self.locked = os.open(self.partial, os.O_RDONLY)
        try:
            fcntl.flock(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.locked)
            raise UsageError(
                f"another run works in {self.partial}; wait for it, or give another --output-dir"
            ) from None


def remote_shards(name: str, output: Path, ranks: SingleProcess) -> RemoteShards:
    """Return the hub's files of a model, of which few are on disk at a time, within the directory of a run.

    Raises:
        UsageError: several ranks would fetch them; also what `RemoteShards` raises.
    """
    if ranks.count > 1:
        raise UsageError("--low-disk runs in one process; start without torchrun, or leave it out")
    return RemoteShards(name, partial_directory(output) / "hub")


def join_journal(output: Path, ranks: SingleProcess) -> Journal:
    """Open the journal that rank 0 has begun, for another rank, which writes only its own activations.

    Raises:
        UsageError: the journal is on a disk that this rank does not see.
    """
    partial = partial_directory(output)
    ranks.gather(None)
    if not partial.exists():
        raise UsageError(f"rank {ranks.rank} sees no {partial}; give an --output-dir that all ranks see")
    return Journal(partial / "journal", output, ranks)
