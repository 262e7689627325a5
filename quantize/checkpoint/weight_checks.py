"""Weights are checked before a run, some rows at a time, so that no weight need be in memory as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from quantize.checkpoint.checkpoint import Checkpoint
from quantize.checkpoint.key_mapping import StoredTensor
from quantize.checkpoint.tensor_files import CHUNK, is_finite, require_finite
from quantize.errors import QuantizeError


def check_weights(checkpoint: Checkpoint, shapes: Mapping[str, torch.Size]) -> None:
    """Check that every parameter in `shapes` is there, has its shape, and is of finite floating-point numbers.

    Raises:
        QuantizeError: a parameter is not; the message names the first one.
    """
    for name, shape in shapes.items():
        if checkpoint.remote is not None and checkpoint.is_encoded(name):
            continue
        check_shape(checkpoint, name, shape)
        if checkpoint.remote is not None:
            continue
        stored = checkpoint.stored(name)
        if stored is None or not all(map(is_finite, numbers_of(checkpoint, stored))):
            require_finite(name, checkpoint.tensor(name))


def check_shape(checkpoint: Checkpoint, name: str, shape: torch.Size) -> None:
    """Check that a parameter is there, has its shape, and is of floating point, by the headers as far as may be.

    Raises:
        QuantizeError: it is not.
    """
    tensor = checkpoint.on_meta(name)
    if tensor.shape != shape:
        raise QuantizeError(f"{name} has the shape {list(tensor.shape)}; the config asks for {list(shape)}")
    if not tensor.is_floating_point():
        raise QuantizeError(f"{name} is of {tensor.dtype}; only floating-point weights can be quantized")


def numbers_of(checkpoint: Checkpoint, stored: StoredTensor) -> Iterator[Tensor]:
    """Yield all numbers of which a tensor is made, some rows at a time."""
    for part in stored.names:
        shape = checkpoint.read_shape(part)
        rows = max(1, CHUNK // max(1, math.prod(shape[1:])))
        starts = range(0, shape[0], rows) if shape else [0]
        yield from (checkpoint.read_part(part, first, rows if shape else None) for first in starts)
