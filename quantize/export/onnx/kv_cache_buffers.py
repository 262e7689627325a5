"""Keys and values of one text, as ONNX Runtime holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

LEAST_CAPACITY = 256  # tokens


@dataclass(frozen=True)
class KVCache:
    """What stands of earlier tokens.

    Attributes:
        values: layer by layer, keys before values, float32 [1, key/value heads, capacity, head_dim]; `capacity` ≥
            `tokens`, and what lies behind the tokens means nothing.
        tokens: how many are held.
    """

    values: list[onnxruntime.OrtValue]
    tokens: int = 0

    def with_capacity(self, wanted: int) -> KVCache:
        """One that holds as much, in place for `wanted` tokens; where it is too small, in new memory of twice that."""
        if self.capacity >= wanted:
            return self
        return self._copied(max(2 * wanted, LEAST_CAPACITY))

    def exact(self) -> KVCache:
        """One without more capacity than it has tokens."""
        return self if self.capacity == self.tokens else self._copied(self.tokens)

    @property
    def capacity(self) -> int:
        """How many tokens it has memory for."""
        return int(self.values[0].shape()[2])

    def _copied(self, capacity: int) -> KVCache:
        def copied(value: onnxruntime.OrtValue) -> onnxruntime.OrtValue:
            held = value.numpy()[:, :, : self.tokens]
            made = np.zeros((*held.shape[:2], capacity, held.shape[3]), np.float32)
            made[:, :, : self.tokens] = held
            return as_value(made)

        return KVCache([copied(value) for value in self.values], self.tokens)


def as_value(array: NDArray[Any]) -> onnxruntime.OrtValue:
    """An array as ONNX Runtime holds it."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
