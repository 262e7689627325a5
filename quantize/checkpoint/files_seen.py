"""The files of a model must stay as they are while a run reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from quantize.errors import ChangedError


@dataclass
class FilesSeen:
    """The files of a model as they were when it was opened.

    Attributes:
        stamps: each file's size, time and number on the disk.
        hashes: the SHA-256 of each file that was hashed.
        remote: the SHA-256 of each file that comes from the hub whenever it is read, which is checked then.
    """

    stamps: dict[Path, tuple[int, int, int]] = field(default_factory=dict)
    hashes: dict[Path, str] = field(default_factory=dict)
    remote: Mapping[Path, str] = field(default_factory=dict)

    @classmethod
    def of(cls, paths: Iterable[Path]) -> FilesSeen:
        """Look at some files without reading them."""
        return cls({path: stamp(path) for path in paths})

    def require_same(self, path: Path) -> None:
        """Check by its stamp that a file is what it was.

        Raises:
            ChangedError: it is not.
        """
        try:
            same = path in self.remote or path not in self.stamps or stamp(path) == self.stamps[path]
        except OSError:
            same = False
        if not same:
            raise changed(path)

    def sha256(self, path: Path) -> str:
        """Return the SHA-256 of a file, in hex; the second time, too, it must be that of the first time.

        Raises:
            ChangedError: the file has changed.
        """
        if path in self.remote:
            return self.remote[path]
        self.require_same(path)
        found = sha256(path)
        if self.hashes.setdefault(path, found) != found:
            raise changed(path)
        return found

    def read(self, path: Path) -> bytes:
        """Return the content of a small file as it was first.

        Raises:
            ChangedError: it has changed.
        """
        self.require_same(path)
        content = path.read_bytes()
        if self.hashes.get(path) not in (None, hashlib.sha256(content).hexdigest()):
            raise changed(path)
        return content

    def require_all_same(self) -> None:
        """Check all files by their stamps, and those that were hashed by their hashes.

        Raises:
            ChangedError: a file has changed.
        """
        for path in self.stamps:
            self.require_same(path)
        for path in list(self.hashes):
            self.sha256(path)


def stamp(path: Path) -> tuple[int, int, int]:
    """Return what changes with a file: its size, the time of its last change, and its number on the disk."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def changed(path: Path) -> ChangedError:
    """Return the error of a file that has changed."""
    return ChangedError(f"{path} has changed since the run began; start again with files that stay as they are")
