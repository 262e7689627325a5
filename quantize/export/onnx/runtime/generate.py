"""Text from an exported model: the smallest loop around ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from quantize.checkpoint.tokenizer import has_tokenizer, load_tokenizer
from quantize.errors import UsageError
from quantize.export.onnx.runtime.decoder_session import OnnxDecoder

PARTIAL = "\ufffd"  # what a tokenizer gives for the first bytes of a character


def stream(directory: Path, prompt: str, max_new_tokens: int) -> Iterator[str]:
    """Continue a prompt, at each step with the most likely token, until the model ends the text or its positions do.

    Args:
        directory: what `quantize-model export --format onnx` wrote for a causal language model.
        prompt: not empty.
        max_new_tokens: at most so many.

    Yields:
        Pieces of text, whole characters each.

    Raises:
        UsageError: no such model, no tokenizer, or a prompt that is empty or too long.
        QuantizeError: ONNX Runtime cannot read the file.
    """
    model = OnnxDecoder(directory)
    tokenizer = tokenizer_of(directory)
    ids = tokenizer(prompt)["input_ids"]
    if not 0 < len(ids) < model.positions:
        raise UsageError(f"the prompt has {len(ids)} tokens; the model takes 1 to {model.positions - 1}")
    yield from detokenize_stream(tokenizer, ids, model.greedy(ids, max_new_tokens))


def detokenize_stream(tokenizer: Any, ids: list[int], tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens behind `ids`, whole characters each."""
    made: list[int] = []
    shown = ""
    for token in tokens:
        made.append(token)
        text = tokenizer.decode(ids + made)[len(tokenizer.decode(ids)) :]
        if not text.endswith(PARTIAL):
            yield text[len(shown) :]
            shown = text


def tokenizer_of(directory: Path) -> Any:
    """The tokenizer that lies beside a model.

    Raises:
        UsageError: there is none.
    """
    if not has_tokenizer(directory):
        raise UsageError(f"{directory} has no tokenizer; export an artifact whose model directory had one")
    return load_tokenizer(directory)
