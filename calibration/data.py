"""Token ids to calibrate and evaluate on, from a text file or rows of JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantize.errors import QuantizeError, UsageError

Tokenize = Callable[[str], list[int]]
BUNDLED = Path(__file__).with_name("books.txt")  # public-domain prose


@dataclass(frozen=True)
class Samples:
    """Rows of token ids, int64, each its own length, and the hash of the file they come from."""

    rows: tuple[Tensor, ...]
    sha256: str

    def batches(self, size: int) -> list[Tensor]:
        """Neighbouring rows of equal length stacked to [≤ size, length], in order."""
        batches: list[list[Tensor]] = []
        for row in self.rows:
            if not batches or len(batches[-1]) == size or len(batches[-1][0]) != len(row):
                batches.append([])
            batches[-1].append(row)
        return [torch.stack(batch) for batch in batches]


def read_samples(path: Path, seqlen: int, limit: int | None, tokenize: Tokenize | None, vocabulary: int) -> Samples:
    """Windows of `seqlen` tokens of a `.txt`, or the rows (cut to `seqlen`) of a `.jsonl`.

    Args:
        path: `.txt`, or `.jsonl` with rows of `text` or `input_ids`.
        seqlen: tokens in a window.
        limit: at most this many rows, spread evenly over the file; None for all.
        tokenize: text → ids; ids need none.
        vocabulary: ids must lie below it.

    Raises:
        UsageError: missing file, unknown kind, malformed row.
        QuantizeError: nothing in it, or less than one window.
    """
    if not path.is_file():
        raise UsageError(f"no such text file: {path}")
    content = path.read_bytes()
    rows = (
        read_jsonl(path, content, seqlen, tokenize)
        if path.suffix == ".jsonl"
        else read_text(path, content, seqlen, tokenize)
    )
    check_ids(path, rows, vocabulary)
    if limit is not None and len(rows) > limit:
        rows = [rows[i * len(rows) // limit] for i in range(limit)]
    return Samples(tuple(torch.tensor(row) for row in rows), hashlib.sha256(content).hexdigest())


def read_text(path: Path, content: bytes, seqlen: int, tokenize: Tokenize | None) -> list[list[int]]:
    """Whole windows of one long text."""
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
    """One row a line."""
    rows = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            rows.append(read_row(json.loads(line), path, tokenize)[:seqlen]) if line.strip() else None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UsageError(
                f'{path} line {number} is no JSON object with "text" or a list of integers "input_ids"'
            ) from None
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise QuantizeError(f"{path} holds no row of two or more tokens")
    return rows


def read_row(row: dict[str, object], path: Path, tokenize: Tokenize | None) -> list[int]:
    """Ids of one JSON object."""
    text = row.get("text")
    ids = require(tokenize, path)(text) if isinstance(text, str) and "input_ids" not in row else row["input_ids"]
    if not isinstance(ids, list) or any(type(i) is not int for i in ids):
        raise TypeError
    return ids


def require(tokenize: Tokenize | None, path: Path) -> Tokenize:
    """The tokenizer, or the reason why one is needed."""
    if tokenize is None:
        raise UsageError(f"{path} holds text, and the model has no tokenizer; give a .jsonl with rows of input_ids")
    return tokenize


def check_ids(path: Path, rows: list[list[int]], vocabulary: int) -> None:
    """All ids lie in the vocabulary."""
    low, high = min(map(min, rows)), max(map(max, rows))
    if low < 0 or high >= vocabulary:
        raise UsageError(f"{path} holds the token id {low if low < 0 else high}; the model knows 0 to {vocabulary - 1}")
