"""A model directory's tokenizer, if it has one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer

from quantize.checkpoint.size_limits import TookTooLong, limit_time
from quantize.errors import QuantizeError, UsageError, reason, shown

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "tekken.json")
TEMPLATE_SECONDS = 5.0  # of a core, in which a chat template, which can loop, makes one text
LETTER = "a"  # some text, around which a tokenizer puts its special tokens


class SpecialToken(NamedTuple):
    """A token that is no part of a text: its id, and how it is written, such as `<bos>`."""

    id: int
    text: str


@dataclass(frozen=True)
class Tokenize:
    """A function from text to token ids without special tokens, which knows those that the tokenizer puts around it.

    Attributes:
        encode: text → ids without special tokens.
        leading: the special tokens that the tokenizer puts in front of each text, such as `<bos>` or `[CLS]`.
        trailing: those that it puts behind each text, such as `[SEP]`.
        conversation: messages, each with a `role` and `content` → text, by the tokenizer's chat template.
    """

    encode: Callable[[str], list[int]]
    leading: tuple[SpecialToken, ...] = ()
    trailing: tuple[SpecialToken, ...] = ()
    conversation: Callable[[Any], str] = lambda _: ""

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text without special tokens."""
        return self.encode(text)

    def whole(self, text: str) -> list[int]:
        """Return the ids of a text with the special tokens around it."""
        return [*(x.id for x in self.leading), *self.encode(text), *(x.id for x in self.trailing)]


def load_tokenizer(directory: Path) -> Any:
    """Load the tokenizer of a directory; code that lies there is never run.

    Raises:
        QuantizeError: the tokenizer cannot be read.
    """
    with readable(directory):
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)


@contextlib.contextmanager
def readable(directory: Path | str, what: str = "tokenizer") -> Iterator[None]:
    """Turn whatever the tokenizer formats of transformers raise, panics of Rust among them, into one sentence."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, TookTooLong, QuantizeError):
        raise
    except BaseException as error:
        raise QuantizeError(f"the {what} in {directory} cannot be used: {reason(error)}") from None


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
    """Return a function from text to token ids; None if the directory has no tokenizer.

    Raises:
        QuantizeError: there is one and it cannot be read.
    """
    if directory is None or not has_tokenizer(directory):
        return None
    return tokenize_with(load_tokenizer(directory), directory)


def tokenize_with(tokenizer: Any, source: Path | str = "memory") -> Tokenize:
    """Return a function from text to token ids that a tokenizer of transformers computes.

    Raises:
        QuantizeError: the tokenizer cannot be used; the message says that it is the one in `source`.
    """

    def encode(text: str, special: bool = False) -> list[int]:
        text = text.encode(errors="replace").decode()  # JSON can hold halves of characters, which no tokenizer takes
        with readable(source):
            return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]  # type: ignore[no-any-return]

    def conversation(messages: Any) -> str:
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(f"the tokenizer in {source} has no chat template for rows of messages; give rows of text")
        try:
            with limit_time(TEMPLATE_SECONDS, "conversations"):
                return tokenizer.apply_chat_template(messages, tokenize=False)  # type: ignore[no-any-return]
        except Exception as error:  # a template may raise anything
            raise UsageError(f"the chat template refuses {shown(messages)}: {reason(error)}") from None

    leading, trailing = around(encode(LETTER), encode(LETTER, special=True))

    def named(ids: list[int]) -> tuple[SpecialToken, ...]:
        with readable(source):
            return tuple(map(SpecialToken, ids, tokenizer.convert_ids_to_tokens(ids)))

    return Tokenize(encode, named(leading), named(trailing), conversation)


def around(plain: list[int], whole: list[int]) -> tuple[list[int], list[int]]:
    """Return what stands in front of and behind `plain` in `whole`, both [] if it is not in there in one piece."""
    n = len(plain)
    start = next((i for i in range(len(whole) - n + 1) if n and whole[i : i + n] == plain), None)
    return ([], []) if start is None else (whole[:start], whole[start + n :])
