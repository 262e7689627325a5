"""A language model runs in ONNX Runtime, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from quantize.errors import UsageError
from quantize.export.onnx.interface import IN_PLACE
from quantize.export.onnx.kv_cache_buffers import KVCache, as_value
from quantize.export.onnx.runtime.session import generation_config, session_of


class OnnxDecoder:
    """A session for one text at a time.

    Args:
        directory: the directory of an exported model.
        file: the file of its decoder.
        given: inputs that are the same at each step; the file gets those that it takes.

    Attributes:
        positions: the number of tokens that the model distinguishes.
        ends: the tokens that end a text.
        in_place_below: fewer tokens than this are written into the cache's own memory; 0 if that is not possible.
    """

    def __init__(
        self, directory: Path, file: str = "model.onnx", given: Mapping[str, NDArray[Any]] = MappingProxyType({})
    ) -> None:
        self.session = session_of(directory, file)
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.scores, *present = self.session.get_outputs()
        self.present = [value.name for value in present]
        self.bound: tuple[Any, Any] = (None, None)  # a cache, and the binding of the session to it
        self.in_place_below = int(self.session.get_modelmeta().custom_metadata_map.get(IN_PLACE, 0))
        self.given = {name: as_value(x) for name, x in given.items() if name in self.inputs}
        self.past = [name for name in self.inputs if name.startswith("past_key_values.") and name not in given]
        if not self.past:
            raise UsageError(
                f"{directory} takes {', '.join(self.inputs)} and no cache; only causal language models continue a text"
            )
        config = generation_config(directory)
        self.positions, self.ends = config.positions, config.ends

    def greedy(self, ids: list[int], max_new_tokens: int) -> Iterator[int]:
        """Yield the most likely tokens after `ids`, one by one."""
        cache, given = self.start(), ids
        for _ in range(min(max_new_tokens, self.positions - len(ids))):
            logits, cache = self.step(given, cache)
            token = int(logits[0, -1].argmax())
            if token in self.ends:
                return
            yield token
            given = [token]

    def start(self) -> KVCache:
        """Return a cache of no tokens."""
        shapes = [self.inputs[name].shape for name in self.past]
        return KVCache([as_value(np.zeros((1, heads, 0, width), np.float32)) for _, heads, _, width in shapes])

    def step(self, given: list[int], cache: KVCache) -> tuple[NDArray[np.float32], KVCache]:
        """Return logits [1, tokens, vocabulary] of tokens after those of a cache, and the cache with the new tokens.

        A cache stays in ONNX Runtime's memory, because arrays would copy all keys and values for each token. If the
        file works in place, ONNX Runtime copies them neither, and `cache` must not be used again.
        """
        total = cache.tokens + len(given)
        feed = {
            "input_ids": np.array([given]),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(cache.tokens, total)[None],
        }
        values = self.given | {name: as_value(array) for name, array in feed.items() if name in self.inputs}
        if len(given) < self.in_place_below:
            held = cache.with_capacity(total).values
            return self._step_in_place(values, held), KVCache(held, total)
        values |= dict(zip(self.past, cache.exact().values, strict=True))
        logits, *present = self.session.run_with_ort_values(None, values)
        return logits.numpy(), KVCache(present, total)

    def _step_in_place(
        self, values: Mapping[str, onnxruntime.OrtValue], held: Sequence[onnxruntime.OrtValue]
    ) -> NDArray[np.float32]:
        """Return the logits; new keys and values are written into the held values."""
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
        """Return a binding of the cache as input and output, kept while the cache stays, because binding is slow."""
        if self.bound[0] is not held:
            self.bound = (held, self.session.io_binding())
            for past, present, value in zip(self.past, self.present, held, strict=True):
                self.bound[1].bind_ortvalue_input(past, value)
                self.bound[1].bind_ortvalue_output(present, value)
        return self.bound[1]
