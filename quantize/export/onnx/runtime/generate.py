"""An exported model generates text in the smallest loop around ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from quantize.checkpoint.tokenizer import has_tokenizer, load_tokenizer
from quantize.errors import UsageError
from quantize.export.onnx.runtime.decoder_session import OnnxDecoder

PARTIAL = "\ufffd"  # what a tokenizer returns for the first bytes of a character


def stream(directory: Path, prompt: str, max_new_tokens: int) -> Iterator[str]:
    """Continue a prompt by the most likely tokens, until the model ends the text or has no more positions.

    Args:
        directory: the directory that `quantize-model export --format onnx` wrote for a causal language model.
        prompt: a text that is not empty.
        max_new_tokens: the largest number of new tokens.

    Yields:
        Pieces of text that consist of whole characters.

    Raises:
        UsageError: there is no such model or no tokenizer, or the prompt is empty or too long.
        QuantizeError: ONNX Runtime cannot read the file.
    """
    model = OnnxDecoder(directory)
    tokenizer = tokenizer_of(directory)
    ids = tokenizer(prompt)["input_ids"]
    if not 0 < len(ids) < model.positions:
        raise UsageError(f"the prompt has {len(ids)} tokens; the model takes 1 to {model.positions - 1}")
    yield from detokenize_stream(tokenizer, ids, model.greedy(ids, max_new_tokens))


def detokenize_stream(tokenizer: Any, ids: list[int], tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text of tokens after `ids`, in whole characters."""
    made: list[int] = []
    shown = ""
    for token in tokens:
        made.append(token)
        text = tokenizer.decode(ids + made)[len(tokenizer.decode(ids)) :]
        if not text.endswith(PARTIAL):
            yield text[len(shown) :]
            shown = text


def tokenizer_of(directory: Path) -> Any:
    """Load the tokenizer from a model's directory.

    Raises:
        UsageError: there is no tokenizer.
    """
    if not has_tokenizer(directory):
        raise UsageError(f"{directory} has no tokenizer; export an artifact whose model directory had one")
    return load_tokenizer(directory)
