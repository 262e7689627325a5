"""Samples to calibrate and evaluate on, whose token ids come from a text file or from rows of JSON."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor

from quantize.checkpoint.tokenizer import SpecialToken, Tokenize
from quantize.checkpoint.untrusted_files import parse_json
from quantize.errors import QuantizeError, UsageError

T = TypeVar("T")
Row = Mapping[str, Tensor]
BUNDLED = Path(__file__).with_name("books.txt")  # public-domain prose
BATCH_TOKENS = 2048  # the number of tokens that run together
PIECE = 1 << 20  # bytes of a text that are tokenized together, which takes some 200 times as much memory
SHORT, CHARACTERS = 1 << 14, 64  # of a row's text that are tokenized together at least, and for each id asked for
HEAD, HEAD_OF_ALL = 1 << 22, 1 << 24  # bytes that are read of a text: more only if that many windows are asked for
LONGEST_LINE = 1 << 24  # bytes of a line of .jsonl


@dataclass(frozen=True)
class Samples:
    """The samples that a model is run on.

    Attributes:
        rows: for each sample the inputs by argument of `forward`, without a batch axis; token ids are int64 [length].
        sha256: the hash of the file that they come from, or of the part of it that was read.
        leading: the special tokens that the tokenizer puts in front of a text, if all samples begin with them.
        part: the number of bytes that were read, and of those in the file; None if the whole file was.
        whole: whether no row may be cut, because its inputs belong together.
    """

    rows: tuple[Row, ...]
    sha256: str
    leading: tuple[SpecialToken, ...] = ()
    part: tuple[int, int] | None = None
    whole: bool = False

    @property
    def tokens(self) -> int:
        """The number of token ids in all rows; in rows taken whole these are the first integers along an axis."""
        ids = [[x for x in row.values() if not x.is_floating_point() and x.dim()] for row in self.rows]
        return sum(x.numel() for found in ids for x in (found[:1] if self.whole else found))

    def size(self) -> str:
        """Say how many tokens there are, and what each sample begins with: `64 tokens, each row behind <bos>`."""
        behind = f", each row behind {self.leading_text}" if self.leading else ""
        return f"{self.tokens} tokens{behind}" + (f", from {self.part_text}" if self.part else "")

    @property
    def part_text(self) -> str:
        """Which part of the file was read: `the first 4,194,304 of 9,000,000 bytes`; `` if it was the whole file."""
        return "the first {:,} of {:,} bytes".format(*self.part) if self.part else ""

    @property
    def leading_text(self) -> str:
        """How the special tokens in front are written, such as `<bos>`."""
        return " ".join(token.text for token in self.leading)

    def size_record(self) -> dict[str, Any]:
        """Return the numbers of rows and tokens, the ids of the tokens in front, and the part read, as plain data."""
        leading = {"leading_tokens": [x.id for x in self.leading]} if self.leading else {}
        part = {"bytes_read": self.part[0], "bytes_in_file": self.part[1]} if self.part else {}
        return {"rows": len(self.rows), "tokens": self.tokens} | leading | part

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
    that it puts around it. Rows of `input_ids` are taken as they are. Of a large file the first `HEAD` bytes are read,
    and more only as long as there are fewer rows than `limit`, so that it costs what its beginning costs.

    Args:
        path: `.txt`, or `.jsonl` with rows of `text` or `input_ids`.
        seqlen: the number of tokens in a window.
        limit: the largest number of rows, which are spread evenly over what is read; None takes all of the first
            `HEAD_OF_ALL` bytes.
        tokenize: a function from text to ids; None will do for a file of ids.
        vocabulary: the number that all ids must lie below.
        name: the argument of `forward` that takes the ids.

    Raises:
        UsageError: the file is missing or of an unknown kind, a row is malformed, or a window has no room for text.
        QuantizeError: the file holds nothing, or less than one window.
    """
    if not path.is_file():
        raise UsageError(f"no such text file: {path}")
    if path.suffix not in (".txt", ".jsonl"):
        raise UsageError(f"{path} is neither .txt nor .jsonl; give one of these")
    with path.open("rb") as opened:
        file = HashedFile(opened)
        read = read_jsonl if path.suffix == ".jsonl" else read_text
        rows = enough(read(path, file, seqlen, tokenize), file, limit)
        size = os.fstat(opened.fileno()).st_size
    if not rows:
        raise QuantizeError(f"{path} holds no row of two or more tokens")
    check_ids(path, min(map(min, rows)), max(map(max, rows)), vocabulary)
    chosen, special = spread(rows, limit), tokenize.leading if tokenize else ()
    leading = [x.id for x in special]
    behind = special if all(row[: len(leading)] == leading for row in chosen) else ()
    part = (file.bytes, size) if file.bytes < size else None
    found = tuple({name: torch.tensor(row)} for row in chosen)
    return Samples(found, file.digest.hexdigest(), behind, part)


class HashedFile:
    """A file that is read from its beginning, with the number and the hash of the bytes read so far."""

    def __init__(self, opened: BinaryIO) -> None:
        self.opened, self.digest, self.bytes = opened, hashlib.sha256(), 0

    def seen(self, content: bytes) -> bytes:
        """Count and hash what was read."""
        self.digest.update(content)
        self.bytes += len(content)
        return content

    def pieces(self) -> Iterator[bytes]:
        """Yield the file in pieces of `PIECE` bytes at most, cut in front of white space, or else of a character."""
        rest = b""
        while content := self.seen(self.opened.read(PIECE - len(rest))):
            content = rest + content
            cut = cut_of(content) if len(content) == PIECE else len(content)
            rest = content[cut:]
            yield content[:cut]
        if rest:
            yield rest

    def lines(self) -> Iterator[bytes]:
        """Yield the lines, of which one too long ends in the middle."""
        while content := self.seen(self.opened.readline(LONGEST_LINE + 1)):
            yield content


def cut_of(content: bytes) -> int:
    """Return where to cut a text in two: in front of its last white space, else of its last character."""
    if (space := max(content.rfind(b" "), content.rfind(b"\n"))) > 0:
        return space
    character = next((n for n in range(1, 5) if content[-n] & 0xC0 != 0x80), 1)  # UTF-8 has at most four bytes
    return len(content) - character


def enough(parts: Iterator[list[list[int]]], file: HashedFile, limit: int | None) -> list[list[int]]:
    """Return the rows of the beginning of a file, and as many more as `limit` asks for."""
    rows: list[list[int]] = []
    for part in parts:
        rows += part
        if file.bytes >= (HEAD_OF_ALL if limit is None else HEAD) and len(rows) >= (limit or 1):
            break
    return rows


def spread(rows: Sequence[T], limit: int | None) -> Sequence[T]:
    """Return at most `limit` rows, evenly spread."""
    return rows if limit is None or len(rows) <= limit else [rows[i * len(rows) // limit] for i in range(limit)]


def read_text(path: Path, file: HashedFile, seqlen: int, tokenize: Tokenize | None) -> Iterator[list[list[int]]]:
    """Yield the whole windows of one long text, piece by piece."""
    tokenize = require(tokenize, path)
    leading = [x.id for x in tokenize.leading]
    room, total, ids = seqlen - len(leading), 0, list[int]()
    if room < 1:
        raise UsageError(
            f"--seqlen {seqlen} leaves no room for text behind the tokenizer's {len(leading)} special tokens; "
            f"give {len(leading) + 1} or more"
        )
    for piece in file.pieces():
        try:
            found = tokenize(piece.decode())
        except UnicodeDecodeError:
            raise UsageError(f"{path} is not UTF-8 text") from None
        total += len(found)
        ids += found
        windows = len(ids) // room
        yield [leading + ids[i * room : (i + 1) * room] for i in range(windows)]
        del ids[: windows * room]
    if total < room:
        raise QuantizeError(
            f"{path} holds {total and total + len(leading)} tokens, less than one window of {seqlen}; "
            "give more text or a smaller --seqlen"
        )


def read_jsonl(path: Path, file: HashedFile, seqlen: int, tokenize: Tokenize | None) -> Iterator[list[list[int]]]:
    """Yield the row of each line, or nothing if it has less than two tokens."""
    for number, line in enumerate(file.lines(), 1):
        if len(line) > LONGEST_LINE:
            raise UsageError(f"{path} line {number} has more than {LONGEST_LINE} bytes; give shorter lines")
        try:
            row = read_row(parse_json(line), path, seqlen, tokenize)[:seqlen] if line.strip() else []
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(
                f'{path} line {number} is no JSON object with "text" or a list of integers "input_ids"'
            ) from None
        yield [row] if len(row) > 1 else []


def read_row(row: dict[str, object], path: Path, seqlen: int, tokenize: Tokenize | None) -> list[int]:
    """Return the ids of one JSON object, of a long text so many at least as a window takes."""
    text = row.get("text")
    if isinstance(text, str) and "input_ids" not in row:
        return beginning(require(tokenize, path), text, seqlen)
    ids = row["input_ids"]
    if not isinstance(ids, list) or any(type(i) is not int for i in ids):
        raise TypeError
    return ids


def beginning(tokenize: Tokenize, text: str, count: int) -> list[int]:
    """Return the ids of a text with the special tokens around it; of a long one some, but more than `count`."""
    ids = [*(x.id for x in tokenize.leading), *first_ids(tokenize, text, count)]
    return ids if len(ids) > count else [*ids, *(x.id for x in tokenize.trailing)]


def first_ids(tokenize: Tokenize, text: str, count: int) -> list[int]:
    """Return the ids of a text without special tokens; of a long one some, but more than `count`."""
    ids, piece = list[int](), min(PIECE, max(SHORT, CHARACTERS * count))
    for start in range(0, len(text), piece):
        ids += tokenize(text[start : start + piece])
        if len(ids) > count:
            break
    return ids


def require(tokenize: Tokenize | None, path: Path) -> Tokenize:
    """Return the tokenizer, or say why one is needed."""
    if tokenize is None:
        raise UsageError(f"{path} holds text, and the model has no tokenizer; give a .jsonl with rows of input_ids")
    return tokenize


def check_ids(path: Path | str, low: int, high: int, vocabulary: int) -> None:
    """Check that the lowest and the highest id lie in the vocabulary."""
    if low < 0 or high >= vocabulary:
        raise UsageError(f"{path} holds the token id {low if low < 0 else high}; the model knows 0 to {vocabulary - 1}")
