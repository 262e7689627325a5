"""Samples to calibrate and evaluate on, whose token ids come from a text file or from rows of JSON."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from quantize.checkpoint.tokenizer import Tokenize
from quantize.checkpoint.untrusted_files import parse_json
from quantize.errors import QuantizeError, UsageError

T = TypeVar("T")
Row = Mapping[str, Tensor]
BUNDLED = Path(__file__).with_name("books.txt")  # public-domain prose
BATCH_TOKENS = 2048  # the number of tokens that run together


@dataclass(frozen=True)
class Samples:
    """The samples that a model is run on.

    Attributes:
        rows: for each sample the inputs by argument of `forward`, without a batch axis; token ids are int64 [length].
        sha256: the hash of the file that they come from.
    """

    rows: tuple[Row, ...]
    sha256: str

    @property
    def tokens(self) -> int:
        """The number of token ids in all rows."""
        return sum(x.numel() for row in self.rows for x in row.values() if not x.is_floating_point())

    def batches(self, size: int) -> list[Row]:
        """Stack neighbouring rows of equal shapes, in order, to batches of at most `size` rows."""
        batches: list[list[Row]] = []
        for row in self.rows:
            if not batches or len(batches[-1]) == size or shapes(batches[-1][0]) != shapes(row):
                batches.append([])
            batches[-1].append(row)
        return [{name: torch.stack([row[name] for row in batch]) for name in batch[0]} for batch in batches]


def shapes(row: Row) -> dict[str, torch.Size]:
    """Return the shape of each input."""
    return {name: x.shape for name, x in row.items()}


def read_samples(
    path: Path, seqlen: int, limit: int | None, tokenize: Tokenize | None, vocabulary: int, name: str = "input_ids"
) -> Samples:
    """Read windows of `seqlen` tokens of a `.txt`, or the rows of a `.jsonl`, each cut to `seqlen`.

    Args:
        path: `.txt`, or `.jsonl` with rows of `text` or `input_ids`.
        seqlen: the number of tokens in a window.
        limit: the largest number of rows, which are spread evenly over the file; None takes all.
        tokenize: a function from text to ids; a file of ids needs none.
        vocabulary: the number that all ids must lie below.
        name: the argument of `forward` that takes the ids.

    Raises:
        UsageError: the file is missing or of an unknown kind, or a row is malformed.
        QuantizeError: the file holds nothing, or less than one window.
    """
    if not path.is_file():
        raise UsageError(f"no such text file: {path}")
    content = path.read_bytes()
    rows = (
        read_jsonl(path, content, seqlen, tokenize)
        if path.suffix == ".jsonl"
        else read_text(path, content, seqlen, tokenize)
    )
    check_ids(path, min(map(min, rows)), max(map(max, rows)), vocabulary)
    chosen = tuple({name: torch.tensor(row)} for row in spread(rows, limit))
    return Samples(chosen, hashlib.sha256(content).hexdigest())


def spread(rows: Sequence[T], limit: int | None) -> Sequence[T]:
    """Return at most `limit` rows, evenly spread."""
    return rows if limit is None or len(rows) <= limit else [rows[i * len(rows) // limit] for i in range(limit)]


def read_text(path: Path, content: bytes, seqlen: int, tokenize: Tokenize | None) -> list[list[int]]:
    """Read whole windows of one long text."""
    if path.suffix != ".txt":
        raise UsageError(f"{path} is neither .txt nor .jsonl; give one of these")
    try:
        ids = require(tokenize, path)(content.decode())
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text") from None
    if len(ids) < seqlen:
        raise QuantizeError(
            f"{path} holds {len(ids)} tokens, less than one window of {seqlen}; give more text or a smaller --seqlen"
        )
    return [ids[i : i + seqlen] for i in range(0, len(ids) - seqlen + 1, seqlen)]


def read_jsonl(path: Path, content: bytes, seqlen: int, tokenize: Tokenize | None) -> list[list[int]]:
    """Read one row from each line."""
    rows = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            rows.append(read_row(parse_json(line), path, tokenize)[:seqlen]) if line.strip() else None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(
                f'{path} line {number} is no JSON object with "text" or a list of integers "input_ids"'
            ) from None
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise QuantizeError(f"{path} holds no row of two or more tokens")
    return rows


def read_row(row: dict[str, object], path: Path, tokenize: Tokenize | None) -> list[int]:
    """Return the ids of one JSON object."""
    text = row.get("text")
    ids = require(tokenize, path)(text) if isinstance(text, str) and "input_ids" not in row else row["input_ids"]
    if not isinstance(ids, list) or any(type(i) is not int for i in ids):
        raise TypeError
    return ids


def require(tokenize: Tokenize | None, path: Path) -> Tokenize:
    """Return the tokenizer, or say why one is needed."""
    if tokenize is None:
        raise UsageError(f"{path} holds text, and the model has no tokenizer; give a .jsonl with rows of input_ids")
    return tokenize


def check_ids(path: Path, low: int, high: int, vocabulary: int) -> None:
    """Check that the lowest and the highest id lie in the vocabulary."""
    if low < 0 or high >= vocabulary:
        raise UsageError(f"{path} holds the token id {low if low < 0 else high}; the model knows 0 to {vocabulary - 1}")
