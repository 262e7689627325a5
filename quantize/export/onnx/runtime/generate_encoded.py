"""Exported language models and encoder-decoders generate text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from quantize.checkpoint.tensor_files import require_finite
from quantize.checkpoint.untrusted_files import read_all
from quantize.errors import UsageError
from quantize.export.onnx.encoder_decoder import DECODER, ENCODER
from quantize.export.onnx.encoder_decoder_parts import MASK
from quantize.export.onnx.runtime.decoder_session import OnnxDecoder
from quantize.export.onnx.runtime.generate import detokenize_stream, stream, tokenizer_of
from quantize.export.onnx.runtime.session import generation_config, running, session_of

Arrays = dict[str, NDArray[Any]]


def generate(directory: Path, prompt: str | None, data: Path | None, max_new_tokens: int) -> Iterator[str]:
    """Yield pieces of text, in whole characters, by the most likely tokens.

    Args:
        directory: the directory that `quantize-model export --format onnx` wrote.
        prompt: the text that a language model continues, or that an encoder of text reads, or with which the text of
            sound begins; the last may be None.
        data: `.safetensors` with a tensor for each input of an encoder that reads no text; its first sample is used.
        max_new_tokens: the largest number of new tokens.

    Raises:
        UsageError: there is no such model or no tokenizer, or the model does not take the prompt or the data.
        QuantizeError: ONNX Runtime cannot read a file, or the data is damaged.
    """
    with running(directory):
        if (directory / ENCODER).is_file():
            yield from encoded(directory, prompt, data, max_new_tokens)
            return
        if prompt is None or data is not None:
            raise UsageError(f"the model in {directory} takes a text alone; give --prompt and no --input")
        yield from stream(directory, prompt, max_new_tokens)


def encoded(directory: Path, prompt: str | None, data: Path | None, max_new_tokens: int) -> Iterator[str]:
    """Generate with an encoder-decoder; arguments, results and errors are those of `generate`."""
    encoder, tokenizer = session_of(directory, ENCODER), tokenizer_of(directory)
    first = generation_config(directory).decoder_start_token_id
    if first is None:
        raise UsageError(f"{directory} names no decoder_start_token_id in config.json; export the model anew")
    start = [first]
    if "input_ids" in shapes(encoder):
        feed = of_text(encoder, prompt, data, tokenizer)
    else:
        feed = of_file(encoder, data)
        start = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else start
    decoder = OnnxDecoder(directory, DECODER, known(encoder, feed))
    yield from detokenize_stream(tokenizer, start, decoder.greedy(start, max_new_tokens))


def known(encoder: onnxruntime.InferenceSession, feed: Arrays) -> Arrays:
    """Return what an encoder's run gives to the decoder, by the decoder's names."""
    names = [value.name.replace("present.", "past_key_values.") for value in encoder.get_outputs()]
    mask = {MASK: feed["attention_mask"]} if "attention_mask" in feed else {}
    return dict(zip(names, encoder.run(None, feed), strict=True)) | mask


def of_text(encoder: onnxruntime.InferenceSession, prompt: str | None, data: Path | None, tokenizer: Any) -> Arrays:
    """Return an encoder's inputs from a text."""
    if prompt is None or data is not None:
        raise UsageError("the model's encoder reads text; give --prompt and no --input")
    ids = np.array([tokenizer(prompt)["input_ids"]])
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return {name: feed[name] for name in shapes(encoder)}


def of_file(encoder: onnxruntime.InferenceSession, data: Path | None) -> Arrays:
    """Return an encoder's inputs from the first sample of a file."""
    wanted = shapes(encoder)
    takes = ", ".join(f"{name} {shape}" for name, shape in wanted.items())
    if data is None:
        raise UsageError(f"the model takes {takes}; give an --input FILE.safetensors that holds this")
    if not data.is_file():
        raise UsageError(f"no such file: {data}; give a .safetensors with {takes}")
    given = {
        name: require_finite(name, tensor[:1].float(), data) for name, tensor in read_all(data).items() if tensor.dim()
    }
    found = {name: tensor.numpy() for name, tensor in given.items()}
    if {name: list(array.shape[1:]) for name, array in found.items()} != {n: s[1:] for n, s in wanted.items()}:
        held = ", ".join(f"{name} {list(array.shape)}" for name, array in found.items())
        raise UsageError(f"{data} holds {held} as its first sample; the model takes {takes}")
    return found


def shapes(session: onnxruntime.InferenceSession) -> dict[str, list[int | str]]:
    """Return a file's inputs: name → sizes of axes, by name if they are free."""
    return {value.name: list(value.shape) for value in session.get_inputs()}
