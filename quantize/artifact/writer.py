"""The directory that a run leaves is whole, with its manifest, or not there at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import save as serialize
from safetensors.torch import save_file
from torch import Tensor

from quantize.artifact.manifest import digest_of
from quantize.checkpoint.files_seen import sha256
from quantize.checkpoint.outputs import first_existing_parent, require_new
from quantize.checkpoint.paths import INDEX
from quantize.errors import QuantizeError

PROBE = "probe.safetensors"  # inputs and outputs to verify with, which are no part of the model


class ArtifactWriter:
    """A writer that writes files beside the final directory and renames them once all are on disk.

    Leaving the `with` block before `commit` removes everything.

    Raises:
        UsageError: the output exists already.
        QuantizeError: the disk is full or not writable.
    """

    def __init__(self, output: Path) -> None:
        require_new(output)
        self.output = output
        self.weight_map: dict[str, str] = {}
        self.hashes: dict[str, str] = {}

    def __enter__(self) -> Self:
        beside = first_existing_parent(self.output)
        with translate_disk_errors(self.output):
            self.directory = Path(tempfile.mkdtemp(prefix=f".{self.output.name}.", dir=beside))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.is_complete(error)
        remove(self.directory)

    def is_complete(self, error: BaseException | None) -> bool:
        """Return whether the directory has its final name, and add that to an error which came afterwards."""
        complete = self.output.exists() and not self.directory.exists()
        if complete and error is not None:
            error.add_note(f"{self.output} is complete")
        return complete

    def add(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write one safetensors file, and wait until it is on disk."""
        if tensors:
            path = self.directory / name
            with translate_disk_errors(self.output):
                save_file({k: t.contiguous() for k, t in sorted(tensors.items())}, path, {"format": "pt"})
                flush(path)
            self.weight_map |= dict.fromkeys(tensors, name)
            self.hashes[name] = sha256(path)

    def write_index(self) -> None:
        """Write which of the safetensors files holds which tensor."""
        size = sum(path.stat().st_size for path in self.directory.glob("*.safetensors"))
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(self.weight_map.items()))}
        self.write(INDEX, as_json(index))

    def add_probe(self, tensors: dict[str, Tensor]) -> None:
        """Write the inputs and outputs that `quantize-model verify` compares with; they are no part of the model."""
        self.write(PROBE, serialize(tensors, {"format": "pt"}))

    def write(self, name: str | Path, content: str | bytes) -> None:
        """Write one small file."""
        path = self.directory / name
        with translate_disk_errors(self.output):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    def commit(self, manifest: dict[str, Any], check: Callable[[Path], object] | None = None) -> dict[str, Any]:
        """Add the manifest with the hash of every file and its digest, flush all to disk, rename, and return it.

        `check` is called with the directory before it is renamed, and may raise an error.
        """
        paths = {str(p.relative_to(self.directory)): p for p in sorted(self.directory.rglob("*")) if p.is_file()}
        files = {name: self.hashes.get(name) or sha256(path) for name, path in paths.items()}
        manifest = json.loads(as_json({**manifest, "files": files}))
        manifest["digest"] = digest_of(manifest)
        self.write("manifest.json", as_json(manifest))
        if check is not None:
            check(self.directory)
        self.publish()
        return manifest

    def publish(self) -> None:
        """Flush all to disk, and rename."""
        with translate_disk_errors(self.output):
            for path in [*self.directory.rglob("*"), self.directory]:
                path.chmod(0o755 if path.is_dir() else 0o644)
                flush(path)
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.directory.rename(self.output)
            flush(self.output.parent)


@contextlib.contextmanager
def translate_disk_errors(output: Path) -> Iterator[None]:
    """Turn errors of the disk into one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or re.search(
            r"no space|os error (27|28|122)\b", str(error).lower()
        )
        reason = "the disk is full" if full else f"writing failed ({error})"
        raise QuantizeError(f"{reason}; {output} was not made") from error


def remove(path: Path) -> None:
    """Remove a file, or a directory with all that is in it; there may be none."""
    try:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    except KeyboardInterrupt:  # no further Ctrl-C keeps this from being cleaned up
        remove(path)
        raise


def flush(path: Path) -> None:
    """Wait until a file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def as_json(value: Any) -> str:
    """Return JSON in the form in which all JSON files here are written."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
