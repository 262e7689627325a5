"""Calibration data lie in directories of Arrow and Parquet files, as `datasets` writes them, or on the hub."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantize.calibration.data import spread
from quantize.calibration.table_files import read_records
from quantize.checkpoint.paths import is_data_set
from quantize.errors import UsageError, reason

KINDS = (".arrow", ".parquet")
SPREAD_OVER = 16  # times as many records as are asked for are read, and taken from evenly


def records_of(data: Path, limit: int) -> list[Any]:
    """Return at most `limit` records, evenly spread over the beginning of a file, a directory or a data set of the hub.

    Raises:
        UsageError: there is no such data, or a package to read it is missing.
        QuantizeError: a file is damaged or holds something else.
    """
    if data.is_dir():
        found = read_directory(data)
    else:
        found = read_hub(str(data)) if is_data_set(str(data)) else read_records(data)
    return list(spread(list(itertools.islice(found, SPREAD_OVER * limit)), limit))


def read_directory(directory: Path) -> Iterator[Any]:
    """Yield the rows of all files of a directory as dicts, those of its part for training if it has one.

    Raises:
        UsageError: there are no such files, one is a link out of the directory, or pyarrow is missing.
    """
    files = [path for path in sorted(directory.rglob("*")) if path.suffix in KINDS]
    files = [path for path in files if not path.name.startswith("cache-")]  # what `datasets` has computed from others
    files = [path for path in files if "train" in str(path.relative_to(directory))] or files
    if not files:
        raise UsageError(
            f"{directory} holds no {' and no '.join(KINDS)} files; give a directory of `datasets`, or one file"
        )
    for path in files:
        if not path.is_file() or not path.resolve().is_relative_to(directory.resolve()):
            raise UsageError(f"{path} is a link out of the directory; put the file itself there")
    return itertools.chain.from_iterable(map(read_records, files))


def read_hub(name: str) -> Iterator[Any]:
    """Yield the rows of a data set on the hub, `owner/name`, `owner/name:configuration` or with `:split` behind.

    Without a split it is `train`. No code of the data set is run, which `datasets` does not do since its version 4.

    Raises:
        UsageError: the package `datasets` is missing, or the data set cannot be had.
    """
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"{name} is no file here, and a data set of the hub needs the package datasets; install it with "
            "pip install 'quantize-model[datasets]', or give a file"
        ) from None
    path, configuration, split, *_ = [*name.split(":"), None, None]
    try:
        yield from datasets.load_dataset(path, configuration, split=split or "train", streaming=True)
    except Exception as error:  # whatever the hub and the readers of the data set raise
        raise UsageError(
            f"{name} is no file here, and no data set that the hub gives ({reason(error)}); give owner/name, perhaps "
            "with :configuration and :split, or a file"
        ) from None
