"""Calibration data come from a file of any known kind, or from Python: texts, ids, tensors, or batches."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantize.calibration.arguments import IN_MEMORY
from quantize.calibration.data import Row, Samples, spread
from quantize.calibration.data_sets import records_of
from quantize.calibration.records import IDS, MASK, ids_of, of_column
from quantize.calibration.table_files import READERS, bounded_reading, holds_records
from quantize.calibration.tensor_samples import (
    Stamped,
    check_shapes,
    check_values,
    described,
    read_calibration,
    read_stamped,
    sample,
    sha256_of,
)
from quantize.checkpoint.paths import is_data_set, require_data
from quantize.checkpoint.safetensors_reader import read_header
from quantize.checkpoint.tokenizer import Tokenize
from quantize.errors import QuantizeError, UsageError
from quantize.graph.inputs import NO_INPUTS, Input

Calibration = str | Path | Tensor | Mapping[str, Tensor] | Iterable[Any]


def read_source(
    data: Calibration | None,
    inputs: Mapping[str, Input],
    seqlen: int,
    limit: int,
    tokenize: Tokenize | None,
    vocabulary: int,
    text_column: str | None = None,
    stamped: Stamped | None = None,
) -> Samples:
    """Read the samples for a model; without data they are windows of the bundled prose.

    Args:
        data: a file, a directory of `datasets`, or a data set of the hub; or texts, lists of ids, a tensor
            [samples, ...], a tensor for each input, or batches of these as a data loader gives them. What
            an `attention_mask` leaves out is removed, so that padding counts nowhere.
        inputs: the inputs that the model takes.
        seqlen: the number of tokens at which a row is cut.
        limit: the largest number of rows: spread evenly over a list or tensor, the first ones of other iterables.
        tokenize, vocabulary: as in `read_samples`.
        text_column: the name of what is used of each record, a text or a conversation; None finds it.
        stamped: what `read_stamped` returned for a `.safetensors` file, if it has been read already.

    Raises:
        UsageError: there is no such column, or the model does not take such data, or needs a tokenizer that it does
            not have.
        QuantizeError: the data hold too little.
    """
    if data is None or isinstance(data, str | Path):
        path = None if data is None else Path(data)
        if path is None or not is_table(path, text_column):
            return read_calibration(path, inputs, seqlen, limit, tokenize, vocabulary, stamped)
        if path.suffix == ".safetensors":
            records = records_in((stamped or read_stamped(path))[0], inputs, limit)
            return samples_of(records, str(path), inputs, seqlen, tokenize, vocabulary, text_column)
        with bounded_reading(path) if path.exists() else contextlib.nullcontext():
            records = [sample for item in records_of(path, limit) for sample in samples_in(item, inputs)]
            return samples_of(records, str(path), inputs, seqlen, tokenize, vocabulary, text_column)
    return samples_of(records_in(data, inputs, limit), IN_MEMORY, inputs, seqlen, tokenize, vocabulary, text_column)


def samples_of(
    records: list[Any],
    source: str,
    inputs: Mapping[str, Input],
    seqlen: int,
    tokenize: Tokenize | None,
    vocabulary: int,
    text_column: str | None,
) -> Samples:
    """Return the samples that some records are; see `read_source`. `source` says where they come from."""
    if text_column is not None:
        records = [of_column(record, text_column, source) for record in records]
    rows = [row_of(record, inputs, seqlen, tokenize, source) for record in records]
    rows = [row for row in rows if all(len(x) > 1 or x.is_floating_point() for x in row.values())]
    if not rows:
        raise QuantizeError(f"{source} holds no row of two or more tokens")
    for row in rows:
        check_values(source, row, vocabulary)
    return Samples(tuple(rows), sha256_of(rows))


def is_table(path: Path, text_column: str | None) -> bool:
    """Return whether data are read record by record.

    Raises:
        UsageError: there are no such data, or they have no columns for `text_column`.
    """
    require_data(path)
    if path.is_dir() or is_data_set(str(path)):
        return True
    if text_column is not None and path.suffix not in READERS:
        raise UsageError(f"{path} has no columns, of which --text-column could name one; leave it out")
    if path.suffix == ".safetensors":  # what a mask leaves out is removed, row by row
        return not {MASK, *NO_INPUTS}.isdisjoint(read_header(path).entries)
    return text_column is not None or holds_records(path)


def records_in(data: Any, inputs: Mapping[str, Input], limit: int) -> list[Any]:
    """Return at most `limit` samples of data in memory."""
    if not isinstance(data, Iterable):
        raise UsageError(f"{IN_MEMORY} is a {type(data).__name__}; give texts, ids, a tensor, batches or a file")
    batched = isinstance(data, Tensor | Mapping)
    found = itertools.chain.from_iterable(samples_in(item, inputs) for item in ([data] if batched else data))
    whole = batched or isinstance(data, list | tuple)
    return list(spread(list(found), limit)) if whole else list(itertools.islice(found, limit))


def samples_in(item: Any, inputs: Mapping[str, Input]) -> Iterator[Any]:
    """Yield the samples of one batch, or the item itself if it is a sample."""
    main, wanted = next(iter(inputs.items()))
    if isinstance(item, list | tuple) and item and isinstance(item[0], Tensor | str):
        if isinstance(item[0], str):
            yield from item
            return
        item = item[0]  # behind the inputs of a batch stand its labels
    if isinstance(item, Tensor):
        item = {main: item}
    first = item.get(main, item.get(IDS)) if isinstance(item, Mapping) else None
    if isinstance(first, Tensor) and first.dim() == wanted.example.dim():
        tensors = {name: x for name, x in item.items() if isinstance(x, Tensor) and len(x) == len(first)}
        yield from ({name: x[i] for name, x in tensors.items()} for i in range(len(first)))
    else:
        yield item


def row_of(record: Any, inputs: Mapping[str, Input], seqlen: int, tokenize: Tokenize | None, source: str) -> Row:
    """Return the inputs of one sample, ids cut to `seqlen`."""
    name, *more = inputs
    if not more and not inputs[name].example.is_floating_point():
        if isinstance(record, Mapping) and name in record:
            record = {**record, IDS: record[name]}
        return {name: torch.tensor(ids_of(record, tokenize, source, seqlen)[:seqlen], dtype=torch.long)}
    if not isinstance(record, Mapping) or not all(isinstance(record.get(n), Tensor) for n in inputs):
        raise UsageError(f"the model takes {described(inputs)}; give a tensor of each")
    check_shapes(source, {n: record[n][None] for n in inputs}, inputs)
    return {n: sample(record[n], seqlen) for n in inputs}
