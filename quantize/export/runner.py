"""Text from an exported model: the smallest loop around ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from quantize.errors import QuantizeError, UsageError, reason
from quantize.export.cache import Cache, as_value
from quantize.export.interface import IN_PLACE
from quantize.export.parity import open_session
from quantize.export.saturation import is_exact
from quantize.tokenizer import has_tokenizer, load_tokenizer

POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions")  # keys of config.json
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
    yield from pieces(tokenizer, ids, model.greedy(ids, max_new_tokens))


def pieces(tokenizer: Any, ids: list[int], tokens: Iterable[int]) -> Iterator[str]:
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


class OnnxDecoder:
    """A session with the cache of one text.

    Args:
        directory: what was exported.
        file: its decoder.
        given: inputs that are the same at each step; of them the file takes what it has.

    Attributes:
        positions: how many tokens the model tells apart.
        ends: tokens that end a text.
        in_place_below: fewer tokens than these are written into the cache's own memory; 0 where none are.
    """

    def __init__(
        self, directory: Path, file: str = "model.onnx", given: Mapping[str, NDArray[Any]] = MappingProxyType({})
    ) -> None:
        self.session = session_of(directory, file)
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.scores, *present = self.session.get_outputs()
        self.present = [value.name for value in present]
        self.bound: tuple[Any, Any] = (None, None)  # a cache, and what binds the session to it
        self.in_place_below = int(self.session.get_modelmeta().custom_metadata_map.get(IN_PLACE, 0))
        self.given = {name: as_value(x) for name, x in given.items() if name in self.inputs}
        self.past = [name for name in self.inputs if name.startswith("past_key_values.") and name not in given]
        if not self.past:
            raise UsageError(
                f"{directory} takes {', '.join(self.inputs)} and no cache; only causal language models continue a text"
            )
        config = read(directory / "config.json")
        self.positions = int(next((config[name] for name in POSITIONS if config.get(name)), 2**31))
        ends = (read(directory / "generation_config.json") | config).get("eos_token_id")
        self.ends = set(ends if isinstance(ends, list) else [ends])

    def greedy(self, ids: list[int], max_new_tokens: int) -> Iterator[int]:
        """The most likely tokens behind `ids`, one after the other."""
        cache, given = self.start(), ids
        for _ in range(min(max_new_tokens, self.positions - len(ids))):
            logits, cache = self.step(given, cache)
            token = int(logits[0, -1].argmax())
            if token in self.ends:
                return
            yield token
            given = [token]

    def start(self) -> Cache:
        """Keys and values of no token."""
        shapes = [self.inputs[name].shape for name in self.past]
        return Cache([as_value(np.zeros((1, heads, 0, width), np.float32)) for _, heads, _, width in shapes])

    def step(self, given: list[int], cache: Cache) -> tuple[NDArray[np.float32], Cache]:
        """Logits [1, tokens, vocabulary] of tokens behind those of a cache, and the cache with them.

        A cache stays where ONNX Runtime keeps it: as arrays, all keys and values were copied for each token. Where the
        file writes new keys and values behind the others, not even ONNX Runtime copies them, and `cache` is used up.
        """
        total = cache.tokens + len(given)
        feed = {
            "input_ids": np.array([given]),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(cache.tokens, total)[None],
        }
        values = self.given | {name: as_value(array) for name, array in feed.items() if name in self.inputs}
        if len(given) < self.in_place_below:
            held = cache.with_room(total).values
            return self._step_in_place(values, held), Cache(held, total)
        values |= dict(zip(self.past, cache.exact().values, strict=True))
        logits, *present = self.session.run_with_ort_values(None, values)
        return logits.numpy(), Cache(present, total)

    def _step_in_place(
        self, values: Mapping[str, onnxruntime.OrtValue], held: Sequence[onnxruntime.OrtValue]
    ) -> NDArray[np.float32]:
        """Logits; new keys and values are written into what is held."""
        binding = self._bound_to(held)
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        shape = (*values["input_ids"].shape(), self.scores.shape[-1])
        logits = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32)
        binding.bind_ortvalue_output(self.scores.name, logits)
        self.session.run_with_iobinding(binding)
        found: NDArray[np.float32] = logits.numpy()
        return found

    def _bound_to(self, held: Sequence[onnxruntime.OrtValue]) -> onnxruntime.IOBinding:
        """The cache as input and output: bound once while it stays where it is, which is much of a step in Python."""
        if self.bound[0] is not held:
            self.bound = (held, self.session.io_binding())
            for past, present, value in zip(self.past, self.present, held, strict=True):
                self.bound[1].bind_ortvalue_input(past, value)
                self.bound[1].bind_ortvalue_output(present, value)
        return self.bound[1]


def session_of(directory: Path, file: str = "model.onnx") -> onnxruntime.InferenceSession:
    """A file of a directory with the session options that lie beside it.

    Raises:
        UsageError: there is none.
        QuantizeError: ONNX Runtime refuses it.
    """
    path = directory / file
    if not path.is_file():
        raise UsageError(f"{directory} holds no {file}; write one with `quantize-model export --format onnx`")
    config = read(directory / "ort_config.json")
    entries = config.get("session_config_entries", {}) | (config.get("with_vnni", {}) if is_exact() else {})
    try:
        return open_session(path, entries)
    except Exception as error:  # of onnxruntime's own kinds
        raise QuantizeError(f"ONNX Runtime cannot load {path}: {reason(error)}") from None


def read(path: Path) -> dict[str, Any]:
    """A JSON object; {} if there is no such file."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise QuantizeError(f"{path} is no JSON: {error}") from None
    return dict(found)
