"""Calibration data lie in directories of Arrow and Parquet files, as `datasets` writes them, or on the hub."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantize.calibration.data import PIECE, spread
from quantize.calibration.table_files import read_records
from quantize.checkpoint.paths import data_files, is_data_set
from quantize.errors import UsageError, reason

SPREAD_OVER = 16  # times as many records as are asked for are read, and taken from evenly


def records_of(data: Path, limit: int) -> list[Any]:
    """Return at most `limit` records, evenly spread over the beginning of a file, a directory or a data set of the hub.

    Raises:
        UsageError: there is no such data, or a package to read it is missing.
        QuantizeError: a file is damaged or holds something else.
    """
    if data.is_dir():
        found: Iterator[Any] = itertools.chain.from_iterable(map(read_records, data_files(data)))
    else:
        found = read_hub(str(data)) if is_data_set(str(data)) else read_records(data)
    return list(spread(list(map(cut, itertools.islice(found, SPREAD_OVER * limit))), limit))


def cut(record: Any) -> Any:
    """Return a record with the beginning of its texts alone, as many are held at a time."""
    if isinstance(record, str):
        return record[:PIECE]
    return {name: cut(x) if isinstance(x, str) else x for name, x in record.items()} if type(record) is dict else record


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
