"""The shapes of a model's tensors as floats, and the files that hold them, from the headers of the files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import nn

from quantize.checkpoint.checkpoint import Checkpoint
from quantize.checkpoint.tensor_files import header_tensor
from quantize.checkpoint.weight_checks import check_shape


def shapes_in(checkpoint: Checkpoint, model: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield each tensor that an artifact of a known class holds, with its shape; of tied ones only the first.

    Raises:
        QuantizeError: the files lack a parameter, or have it in another shape.
    """
    for name, parameter in model.named_parameters():
        if name not in checkpoint.computed and not checkpoint.is_encoded(checkpoint.stored_name(name)):
            check_shape(checkpoint, name, parameter.shape)
    places = model.state_dict()
    for name in checkpoint.sources:
        if name in places and checkpoint.stored_name(name) == name:
            yield name, tuple(places[name].shape)


def shapes_of(checkpoint: Checkpoint) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield each tensor with its shape as floats; of parts of the same shapes the first tells of the others."""
    known = dict[object, tuple[int, ...]]()
    for name in checkpoint.sources:
        if not checkpoint.is_encoded(name):
            yield name, checkpoint.read_shape(name)
            continue
        parts = checkpoint.encoded[name].parts
        headers = {role: header_tensor(checkpoint.files[part], part) for role, part in parts.items()}
        key: tuple[object, ...] = tuple((role, x.shape, x.dtype) for role, x in headers.items())
        if "shape" in parts and checkpoint.has_weights:
            key = (*key, str(checkpoint.read_part(parts["shape"]).tolist()))
        if key not in known:
            known[key] = checkpoint.float_shape(name)
        yield name, known[key]


def file_of(checkpoint: Checkpoint, name: str) -> Path:
    """Return the file that holds a tensor, or the first of its parts."""
    first = checkpoint.sources[name].names[0]
    part = next(iter(checkpoint.encoded[first].parts.values())) if first in checkpoint.encoded else first
    return checkpoint.files[part]
