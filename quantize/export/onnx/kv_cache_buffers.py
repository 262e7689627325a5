"""Keys and values of one text are held in ONNX Runtime's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

LEAST_CAPACITY = 256  # tokens


@dataclass(frozen=True)
class KVCache:
    """Keys and values of earlier tokens.

    Attributes:
        values: layer by layer, keys before values, float32 [1, key/value heads, capacity, head_dim]; `capacity` ≥
            `tokens`, and the values after the tokens mean nothing.
        tokens: the number of tokens that are held.
    """

    values: list[onnxruntime.OrtValue]
    tokens: int = 0

    def with_capacity(self, wanted: int) -> KVCache:
        """Return a cache with room for `wanted` tokens: this one, or a copy with room for twice as many."""
        if self.capacity >= wanted:
            return self
        return self._copied(max(2 * wanted, LEAST_CAPACITY))

    def exact(self) -> KVCache:
        """Return a cache that has no more capacity than tokens."""
        return self if self.capacity == self.tokens else self._copied(self.tokens)

    @property
    def capacity(self) -> int:
        """The number of tokens for which there is memory."""
        return int(self.values[0].shape()[2])

    def _copied(self, capacity: int) -> KVCache:
        def copied(value: onnxruntime.OrtValue) -> onnxruntime.OrtValue:
            held = value.numpy()[:, :, : self.tokens]
            made = np.zeros((*held.shape[:2], capacity, held.shape[3]), np.float32)
            made[:, :, : self.tokens] = held
            return as_value(made)

        return KVCache([copied(value) for value in self.values], self.tokens)


def as_value(array: NDArray[Any]) -> onnxruntime.OrtValue:
    """Return an array in ONNX Runtime's memory."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
