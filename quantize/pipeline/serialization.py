"""Plain data with tensors in it as one safetensors file, which gives the same bits back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor

from quantize.calibration.statistics import Absmax, Gram, Rows
from quantize.transforms.block_rotation import BlockRotation
from quantize.transforms.dual_rotation import DualRotation
from quantize.transforms.fold import CentredRotation, Diagonal, Rotation

SERIALIZABLE = (Absmax, Gram, Rows, Diagonal, Rotation, CentredRotation, BlockRotation, DualRotation)
ALIGNMENT = 64  # bytes; torch allocates at multiples of them


def contiguous(value: Any) -> Any:
    """A value that is laid out as `load_state` gives it back, so that a resumed run computes what it would have.

    A product may be summed in another order where strides, or the place in memory, differ. So each tensor in lists,
    tuples, mappings and `SERIALIZABLE` becomes contiguous and aligned, a copy if it is not; all else stays as it is.
    """
    if isinstance(value, Tensor):
        plain = value.stride() == torch.empty(value.shape, device="meta").stride()
        return value if plain and value.data_ptr() % ALIGNMENT == 0 else fresh(value)
    if isinstance(value, list | tuple):
        return [*map(contiguous, value)] if isinstance(value, list) else (*map(contiguous, value),)
    if isinstance(value, Mapping):
        return {key: contiguous(item) for key, item in value.items()}
    if type(value) in kinds().values():
        fields = {field.name: contiguous(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def fresh(x: Tensor) -> Tensor:
    """A contiguous copy in memory of its own."""
    return x.clone(memory_format=torch.contiguous_format)


def save_state(path: Path, value: Any) -> None:
    """Write numbers, text, None, lists, tuples, mappings with keys of text or numbers, tensors and `SERIALIZABLE`.

    Raises:
        TypeError: something else is in it.
    """
    tensors: list[Tensor] = []
    plain = flatten(value, tensors)
    save_file({str(i): fresh(x) for i, x in enumerate(tensors)}, path, {"stored": json.dumps(plain)})


def load_state(path: Path) -> Any:
    """What `save_state` was given; each tensor contiguous, in aligned memory of its own.

    Raises:
        SafetensorError, ValueError, KeyError, RuntimeError: the file is damaged, or was written by something else.
    """
    with safe_open(path, framework="pt") as file:
        plain = json.loads((file.metadata() or {})["stored"])
        tensors = [fresh(file.get_tensor(str(i))) for i in range(len(file.keys()))]
    return unflatten(plain, tensors)


def to_bytes(value: Any) -> bytes:
    """As `save_state`, for another process, which needs no more than the values of tensors."""
    tensors: list[Tensor] = []
    plain = flatten(value, tensors)
    content: bytes = save({str(i): fresh(x) for i, x in enumerate(tensors)}, {"stored": json.dumps(plain)})
    return content


def from_bytes(content: bytes) -> Any:
    """What `to_bytes` was given."""
    tensors = load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return unflatten(json.loads(header["__metadata__"]["stored"]), [tensors[str(i)] for i in range(len(tensors))])


def flatten(value: Any, tensors: list[Tensor]) -> Any:
    """JSON for a value; its tensors are appended to a list, and their numbers stand in for them."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        tensors.append(value.detach())
        return {"tensor": len(tensors) - 1}
    if isinstance(value, list | tuple):
        return {"list" if isinstance(value, list) else "tuple": [flatten(item, tensors) for item in value]}
    if isinstance(value, Mapping):
        return {"dict": [[key, flatten(item, tensors)] for key, item in value.items()]}
    if type(value) in kinds().values():
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"kind": type(value).__name__, "fields": flatten(fields, tensors)}
    raise TypeError(f"a {type(value).__name__} cannot be stored")


def kinds() -> dict[str, type]:
    """Classes whose instances can be stored, by name: `SERIALIZABLE` and what is derived from them."""
    found: list[type] = list(SERIALIZABLE)
    for kind in found:
        derived: list[type] = type.__subclasses__(kind)
        found += [x for x in derived if x not in found]
    return {kind.__name__: kind for kind in found}


def unflatten(plain: Any, tensors: list[Tensor]) -> Any:
    """What `flatten` was given."""
    match plain:
        case {"tensor": number}:
            return tensors[number]
        case {"list": items}:
            return [unflatten(item, tensors) for item in items]
        case {"tuple": items}:
            return tuple(unflatten(item, tensors) for item in items)
        case {"dict": items}:
            return {key: unflatten(item, tensors) for key, item in items}
        case {"kind": kind, "fields": fields}:
            return kinds()[kind](**unflatten(fields, tensors))
    return plain
