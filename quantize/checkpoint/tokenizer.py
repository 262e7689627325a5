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
    """The tokenizer of a directory; code that lies there is never run.

    Raises:
        QuantizeError: it cannot be read.
    """
    with readable(directory):
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)


@contextlib.contextmanager
def readable(directory: Path) -> Iterator[None]:
    """Turn whatever transformers' many formats raise, panics of Rust among them, into one sentence."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise QuantizeError(f"the tokenizer in {directory} cannot be used: {reason(error)}") from None


def has_tokenizer(directory: Path | None) -> bool:
    """Whether a directory has a tokenizer."""
    return directory is not None and any((directory / name).is_file() for name in TOKENIZER_FILES)


def bos_token(directory: Path | None) -> int | None:
    """Id of the token that begins a text; None where the directory's tokenizer has none, or there is no tokenizer.

    Raises:
        QuantizeError: there is one and it cannot be read.
    """
    if directory is None or not has_tokenizer(directory):
        return None
    found: int | None = load_tokenizer(directory).bos_token_id
    return found


def load_tokenize(directory: Path | None) -> Tokenize | None:
    """Text → token ids without special tokens; None where the directory has no tokenizer.

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
