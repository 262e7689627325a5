"""Calibration data lie in tables and lists: .parquet, .arrow, .csv, .json, conversations in .jsonl, tensors in .pt."""

from __future__ import annotations

import contextlib
import csv
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from quantize.calibration.data import LONGEST_LINE
from quantize.calibration.records import MASK, MESSAGES
from quantize.checkpoint.files_seen import stamp
from quantize.checkpoint.size_limits import limit_data, limit_time
from quantize.checkpoint.untrusted_files import parse_json
from quantize.errors import QuantizeError, UsageError, reason

LARGEST = 1 << 28  # bytes of a .json or .pt file, which is read whole
LONGEST_CELL = 1 << 24  # characters
MEMORY, SECONDS = 1 << 30, 20.0  # bytes, and seconds of a core, that reading a file may take
ROWS = 16  # of a table that are in memory at a time, beside those that are taken


def holds_records(path: Path) -> bool:
    """Return whether a file is read record by record: all kinds of `READERS`, of .jsonl those with conversations."""
    if path.suffix != ".jsonl":
        return path.suffix in READERS
    with path.open("rb") as file:
        lines = itertools.islice(iter(lambda: file.readline(LONGEST_LINE), b""), 100)
        first = next((line for line in lines if line.strip()), b"")
    return f'"{MESSAGES}"'.encode() in first or f'"{MASK}"'.encode() in first


def read_records(path: Path) -> Iterator[Any]:
    """Yield the records of a file.

    Raises:
        UsageError: the file is too large to be read whole, or a package to read it is missing.
        QuantizeError: the file is damaged or holds something else.
    """
    if path.suffix in (".json", ".pt") and path.stat().st_size > LARGEST:
        raise UsageError(f"{path} has more than {LARGEST:,} bytes; give .parquet, .jsonl or .safetensors")
    with errors_of(path):
        yield from READERS[path.suffix](path)


@contextlib.contextmanager
def bounded_reading(path: Path) -> Iterator[None]:
    """Bound what reading data that somebody else wrote may take, and turn whatever readers raise into one sentence.

    Raises:
        QuantizeError: a file is damaged, takes more memory or time, or holds something else.
    """
    with errors_of(path), limit_data(MEMORY), limit_time(SECONDS, "calibration data"):
        yield


@contextlib.contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Turn whatever the readers of other packages raise into one sentence that names the file."""
    try:
        yield
    except QuantizeError:
        raise
    except MemoryError:
        raise QuantizeError(
            f"{path} cannot be read: it takes more than {MEMORY:,} bytes of memory; it is damaged, or give smaller rows"
        ) from None
    except Exception as error:
        raise QuantizeError(f"{path} cannot be read ({reason(error)})") from None


def read_parquet(path: Path) -> Iterator[Any]:
    """Yield the rows of a Parquet file as dicts, without reading it whole."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise missing_package(path) from None
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=ROWS):
            yield from batch.to_pylist()


def read_arrow(path: Path) -> Iterator[Any]:
    """Yield the rows of an Arrow file, as `datasets` saves them, as dicts, without reading it whole."""
    try:
        import pyarrow.ipc
    except ImportError:
        raise missing_package(path) from None
    with pyarrow.OSFile(str(path)) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        if is_file:
            reader = pyarrow.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(file))
        for batch in batches:
            batch.validate(full=True)  # pyarrow believes offsets, and would read beyond the file's memory
            for first in range(0, batch.num_rows, ROWS):
                yield from batch.slice(first, ROWS).to_pylist()


def missing_package(path: Path) -> UsageError:
    """Return the error for a file of columns without the package that reads it."""
    return UsageError(f"{path} needs the package pyarrow; install it, or give .jsonl or .csv")


def read_csv(path: Path) -> Iterator[Any]:
    """Yield the rows of a file of comma-separated values as dicts, whose keys stand in the first line."""
    csv.field_size_limit(LONGEST_CELL)
    with path.open(newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file, strict=True)


def read_json_list(path: Path) -> Iterator[Any]:
    """Yield the elements of a JSON list, or of the only list in a JSON object."""
    found = parse_json(path.read_bytes())
    lists = [value for value in found.values() if isinstance(value, list)] if isinstance(found, dict) else [found]
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise QuantizeError(f"{path} holds no list of texts or rows")
    yield from lists[0]


def read_jsonl_records(path: Path) -> Iterator[Any]:
    """Yield one record for each line."""
    with path.open("rb") as file:
        yield from (parse_json(line) for line in file if line.strip())


def read_tensors(path: Path) -> Iterator[Any]:
    """Yield the samples of a tensor, a list, or a dict of tensors that torch saved; no other object is read."""
    found = load_tensors(path).content
    if isinstance(found, Mapping):
        tensors = {name: x for name, x in found.items() if isinstance(x, Tensor)}
        rows = min((len(x) for x in tensors.values()), default=0)
        yield from ({name: x[i] for name, x in tensors.items()} for i in range(rows))
    elif isinstance(found, Tensor | list | tuple):
        yield from found
    else:
        raise QuantizeError(
            f"{path} holds a {type(found).__name__}; give a tensor, a list of them, or one for each input"
        )


@dataclass(frozen=True, eq=False)
class Saved:
    """What torch saved in a file, which is read once as long as somebody holds it."""

    content: Any


HELD: WeakValueDictionary[tuple[object, ...], Saved] = WeakValueDictionary()


def load_tensors(path: Path) -> Saved:
    """Return what torch saved in a file, of tensors and containers alone.

    Raises:
        UsageError: the file is too large to be read whole.
        QuantizeError: it is damaged or holds something else.
    """
    if path.stat().st_size > LARGEST:
        raise UsageError(f"{path} has more than {LARGEST:,} bytes; give .parquet, .jsonl or .safetensors")
    key = (path, *stamp(path))
    if (held := HELD.get(key)) is not None:
        return held
    try:
        found = Saved(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises anything
        raise QuantizeError(f"{path} cannot be read ({reason(error)})") from None
    HELD[key] = found
    return found


READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".arrow": read_arrow,
    ".csv": read_csv,
    ".json": read_json_list,
    ".jsonl": read_jsonl_records,
    ".parquet": read_parquet,
    ".pt": read_tensors,
}
