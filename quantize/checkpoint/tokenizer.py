"""A model directory's tokenizer, if it has one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from quantize.errors import QuantizeError, reason

Tokenize = Callable[[str], list[int]]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "tekken.json")


def load_tokenizer(directory: Path) -> Any:
    """Load the tokenizer of a directory; code that lies there is never run.

    Raises:
        QuantizeError: the tokenizer cannot be read.
    """
    with readable(directory):
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)


@contextlib.contextmanager
def readable(directory: Path) -> Iterator[None]:
    """Turn whatever the tokenizer formats of transformers raise, panics of Rust among them, into one sentence."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise QuantizeError(f"the tokenizer in {directory} cannot be used: {reason(error)}") from None


def has_tokenizer(directory: Path | None) -> bool:
    """Return whether a directory has a tokenizer."""
    return directory is not None and any((directory / name).is_file() for name in TOKENIZER_FILES)


def bos_token(directory: Path | None) -> int | None:
    """Return the id of the token that begins a text; None if there is no such token or no tokenizer.

    Raises:
        QuantizeError: there is one and it cannot be read.
    """
    if directory is None or not has_tokenizer(directory):
        return None
    found: int | None = load_tokenizer(directory).bos_token_id
    return found


def load_tokenize(directory: Path | None) -> Tokenize | None:
    """Return a function from text to token ids without special tokens; None if the directory has no tokenizer.

    Raises:
        QuantizeError: there is one and it cannot be read.
    """
    if directory is None or not has_tokenizer(directory):
        return None
    tokenizer = load_tokenizer(directory)

    def tokenize(text: str) -> list[int]:
        with readable(directory):
            return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[no-any-return]

    return tokenize
