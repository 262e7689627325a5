"""Samples to calibrate and evaluate on, whose token ids come from a text file or from rows of JSON."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from quantize.checkpoint.tokenizer import SpecialToken, Tokenize
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
        leading: the special tokens that the tokenizer puts in front of a text, if all samples begin with them.
    """

    rows: tuple[Row, ...]
    sha256: str
    leading: tuple[SpecialToken, ...] = ()

    @property
    def tokens(self) -> int:
        """The number of token ids in all rows."""
        return sum(x.numel() for row in self.rows for x in row.values() if not x.is_floating_point())

    def size(self) -> str:
        """Say how many tokens there are, and what each sample begins with: `64 tokens, each row behind <bos>`."""
        return f"{self.tokens} tokens" + (f", each row behind {self.leading_text}" if self.leading else "")

    @property
    def leading_text(self) -> str:
        """How the special tokens in front are written, such as `<bos>`."""
        return " ".join(token.text for token in self.leading)

    def size_record(self) -> dict[str, Any]:
        """Return the numbers of rows and tokens, and the ids of the special tokens in front, as plain data."""
        leading = {"leading_tokens": [x.id for x in self.leading]} if self.leading else {}
        return {"rows": len(self.rows), "tokens": self.tokens} | leading

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

    Each window begins with the special tokens that the tokenizer puts in front of a text, and a row of `text` has all
    that it puts around it. Rows of `input_ids` are taken as they are.

    Args:
        path: `.txt`, or `.jsonl` with rows of `text` or `input_ids`.
        seqlen: the number of tokens in a window.
        limit: the largest number of rows, which are spread evenly over the file; None takes all.
        tokenize: a function from text to ids; None will do for a file of ids.
        vocabulary: the number that all ids must lie below.
        name: the argument of `forward` that takes the ids.

    Raises:
        UsageError: the file is missing or of an unknown kind, a row is malformed, or a window has no room for text.
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
    chosen, special = spread(rows, limit), tokenize.leading if tokenize else ()
    leading = [x.id for x in special]
    behind = special if all(row[: len(leading)] == leading for row in chosen) else ()
    return Samples(tuple({name: torch.tensor(row)} for row in chosen), hashlib.sha256(content).hexdigest(), behind)


def spread(rows: Sequence[T], limit: int | None) -> Sequence[T]:
    """Return at most `limit` rows, evenly spread."""
    return rows if limit is None or len(rows) <= limit else [rows[i * len(rows) // limit] for i in range(limit)]


def read_text(path: Path, content: bytes, seqlen: int, tokenize: Tokenize | None) -> list[list[int]]:
    """Read whole windows of one long text."""
    if path.suffix != ".txt":
        raise UsageError(f"{path} is neither .txt nor .jsonl; give one of these")
    tokenize = require(tokenize, path)
    try:
        ids = tokenize(content.decode())
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text") from None
    leading = [x.id for x in tokenize.leading]
    room = seqlen - len(leading)
    if room < 1:
        raise UsageError(
            f"--seqlen {seqlen} leaves no room for text behind the tokenizer's {len(leading)} special tokens; "
            f"give {len(leading) + 1} or more"
        )
    if len(ids) < room:
        raise QuantizeError(
            f"{path} holds {len(ids) + len(leading)} tokens, less than one window of {seqlen}; "
            "give more text or a smaller --seqlen"
        )
    return [leading + ids[i : i + room] for i in range(0, len(ids) - room + 1, room)]


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
    ids = require(tokenize, path).whole(text) if isinstance(text, str) and "input_ids" not in row else row["input_ids"]
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
