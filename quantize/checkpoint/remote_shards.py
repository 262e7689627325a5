"""A model on the hub is read though few of its files are on disk: each is fetched when it is needed, and removed again.

A file that is not here is a hole behind its header, which is fetched alone, so that all that looks at headers and sizes
works as with a directory.
"""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from transformers.core_model_loading import dot_natural_key

from quantize.checkpoint.files_seen import sha256
from quantize.checkpoint.hub import SHA256, hub_errors
from quantize.checkpoint.paths import INDEX, LARGEST_HEADER, SIDE_FILES, check_low_disk
from quantize.checkpoint.safetensors_reader import read_header
from quantize.checkpoint.untrusted_files import indexed_names
from quantize.errors import QuantizeError

SHARDS = 3  # that are on disk at a time: the one before, the one that is read, and the next one
FIRST = 100_000  # bytes, which hold most headers


class RemoteShards:
    """The files of a model on the hub, of which at most `SHARDS` with weights are on disk at a time.

    Leaving the `with` block ends what is being fetched.

    Args:
        name: the id, perhaps with `@` and a revision behind it.
        cache: the folder where files are put, laid out as the hub's cache.
        fetches: whether weights may be fetched; a dry run needs the headers alone.

    Attributes:
        directory: the snapshot, with config and other small files, and the files with weights or holes.
        hashes: the SHA-256 that the hub gives for each file with weights.
        peak: the most bytes of the files with weights that were on disk at a time.
        fetched: the bytes of all files that were fetched, of which some may be fetched again.
        round: the files that were fetched since one was fetched again, which are not fetched ahead of need.

    Raises:
        UsageError: the hub does not give the model.
    """

    def __init__(self, name: str, cache: Path, fetches: bool = True) -> None:
        from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url, snapshot_download

        self.name, _, revision = name.partition("@")
        self.cache, self.fetches, self.peak, self.fetched = cache, fetches, 0, 0
        self.hashes, self.sizes = dict[Path, str](), dict[Path, int]()
        self.held, self.following = OrderedDict[Path, Future[None]](), dict[Path, Path | None]()
        self.pool, self.round = ThreadPoolExecutor(1), set[Path]()
        with hub_errors(self.name, revision or None):
            info = HfApi().model_info(self.name, revision=revision or constants.DEFAULT_REVISION)
            self.commit = str(info.sha)
            patterns = [f"*{suffix}" for suffix in sorted(SIDE_FILES)]
            self.directory = Path(
                snapshot_download(self.name, revision=self.commit, allow_patterns=patterns, cache_dir=cache)
            )
            index = self.directory / INDEX
            there = {x.rfilename for x in info.siblings or () if x.rfilename.endswith(".safetensors")}
            for file in sorted(there & indexed_names(index) if index.is_file() else there):
                url = hf_hub_url(self.name, file, revision=self.commit)
                found = get_hf_file_metadata(url)
                path = self.directory / file
                self.hashes[path], self.sizes[path] = str(found.etag), int(found.size or 0)
                write_hole(path, fetch_header(url, file), self.sizes[path])
        first = {path: min(read_header(path).entries, key=dot_natural_key, default="") for path in self.sizes}
        order = sorted(self.sizes, key=lambda path: (dot_natural_key(first[path]), path))
        self.following = dict(zip(order, [*order[1:], None], strict=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)

    def summary(self) -> str:
        """Say how much of the model was on disk, in a sentence."""
        return (
            f"at most {self.peak:,} bytes of the model's {sum(self.sizes.values()):,} were on disk at a time, and "
            f"{self.fetched:,} were fetched"
        )

    def read_bytes(self, path: Path, first: int, count: int) -> bytes:
        """Fetch some bytes of a file with weights by a request of a range.

        Raises:
            UsageError: the hub does not give them.
        """
        from huggingface_hub import hf_hub_url

        with hub_errors(self.name, self.commit):
            return fetch_range(hf_hub_url(self.name, path.name, revision=self.commit), first, count)

    @property
    def most_bytes(self) -> int:
        """The most bytes that the files with weights can take at a time."""
        return sum(sorted(self.sizes.values())[-SHARDS:])

    def require(self, path: Path) -> None:
        """Wait until a file is on disk, and begin to fetch the one behind it.

        Raises:
            UsageError: the hub does not give it.
            QuantizeError: what the hub gives has another SHA-256 than it says.
        """
        if path not in self.sizes:
            return
        assert self.fetches, "a dry run reads headers alone"
        self._begin(path)
        self.held.move_to_end(path)
        try:
            self.held[path].result()
        except BaseException:
            del self.held[path]
            raise
        following = self.following[path]
        if following is not None and following not in self.round:
            self._begin(following)

    def _begin(self, path: Path) -> None:
        """Begin to fetch a file, if it is not here; before it, the file that was not read for longest is removed."""
        if path in self.held:
            return
        while len(self.held) >= SHARDS:
            oldest, future = self.held.popitem(last=False)
            if future.exception() is None:
                start = read_header(oldest).start
                os.truncate(oldest, start)
                os.truncate(oldest, self.sizes[oldest])
        self.round = {path} if path in self.round else self.round | {path}
        self.held[path] = self.pool.submit(self._fetch, path)

    def _fetch(self, path: Path) -> None:
        """Fetch a file, check it, and put it in its place."""
        from huggingface_hub import hf_hub_download

        with hub_errors(self.name, self.commit):
            found = Path(hf_hub_download(self.name, path.name, revision=self.commit, cache_dir=self.cache / "fetched"))
        blob = found.resolve()
        if SHA256.fullmatch(self.hashes[path]) and sha256(blob) != self.hashes[path]:
            blob.unlink()
            raise QuantizeError(
                f"{path.name} of {self.name} has not the SHA-256 that the hub gives for it; start again, and it is "
                "fetched anew"
            )
        taken = sum(512 * file.stat().st_blocks for file in self.sizes)
        self.peak = max(self.peak, taken + 512 * blob.stat().st_blocks)
        self.fetched += self.sizes[path]
        blob.replace(path)
        found.unlink()


@contextlib.contextmanager
def headers_alone(model: str, low_disk: bool) -> Iterator[str | RemoteShards]:
    """Yield a model as it is given, or with `low_disk` the headers of its files on the hub, without their weights.

    Raises:
        UsageError: as `check_low_disk` and `RemoteShards` do.
    """
    check_low_disk(model, low_disk)
    if not low_disk:
        yield model
        return
    with tempfile.TemporaryDirectory() as cache, RemoteShards(model, Path(cache), fetches=False) as found:
        yield found


def fetch_header(url: str, file: str) -> bytes:
    """Return the beginning of a safetensors file up to its first tensor, by requests of ranges.

    Raises:
        QuantizeError: it has no sound length.
    """
    start = fetch_range(url, 0, FIRST)
    length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
    if not 0 < length <= LARGEST_HEADER:
        raise QuantizeError(f"{file} on the hub is no safetensors file: its header has {length} bytes")
    return start[: 8 + length] if 8 + length <= len(start) else fetch_range(url, 0, 8 + length)


def fetch_range(url: str, first: int, count: int) -> bytes:
    """Return some bytes of a file on the hub, or fewer at its end, also from a server that knows no ranges."""
    from huggingface_hub import get_session, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    found = b""
    own = {"Range": f"bytes={first}-{first + count - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers={**build_hf_headers(), **own}) as response:
        hf_raise_for_status(response)
        skipped = 0 if response.status_code == 206 else first
        for piece in response.iter_bytes():
            found += piece
            if len(found) >= skipped + count:
                break
    return found[skipped : skipped + count]


def write_hole(path: Path, header: bytes, size: int) -> None:
    """Write a file that has its size and its header, and takes no more room on disk than that."""
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(size)
