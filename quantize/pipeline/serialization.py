"""Plain data with tensors in it is stored as one safetensors file, from which the same bits are read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save, save_file
from torch import Tensor

from quantize.calibration.runner import SequentialRunner
from quantize.calibration.statistics import Absmax, Gram, Rows
from quantize.checkpoint.safetensors_reader import read_header, read_rows
from quantize.transforms.block_rotation import BlockRotation
from quantize.transforms.dual_rotation import DualRotation
from quantize.transforms.fold import CentredRotation, Diagonal, GainFold, Rotation

SERIALIZABLE = (Absmax, Gram, Rows, Diagonal, GainFold, Rotation, CentredRotation, BlockRotation, DualRotation)
ALIGNMENT = 64  # bytes; torch allocates at multiples of them


def contiguous(value: Any) -> Any:
    """Lay out a value as `load_state` returns it, so that a resumed run computes the same bits as one without a break.

    The order in which a product is summed can depend on strides and on the place in memory. So each tensor in lists,
    tuples, mappings and `SERIALIZABLE` becomes contiguous and aligned, by a copy if need be; other values stay as is.
    """
    if isinstance(value, Tensor):
        plain = value.stride() == torch.empty(value.shape, device="meta").stride()
        aligned = value.device.type != "cpu" or value.data_ptr() % ALIGNMENT == 0
        return value if plain and aligned else fresh(value)
    if isinstance(value, list | tuple):
        return [*map(contiguous, value)] if isinstance(value, list) else (*map(contiguous, value),)
    if isinstance(value, Mapping):
        return {key: contiguous(item) for key, item in value.items()}
    if type(value) in kinds().values():
        fields = {field.name: contiguous(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def lay_out(runner: SequentialRunner) -> None:
    """Make all values that a runner carries contiguous."""
    for number, values in enumerate(runner.values):
        laid_out = {node: contiguous(value) for node, value in values.items()}
        if any(laid_out[node] is not value for node, value in values.items()):
            runner.values[number] = laid_out


def fresh(x: Tensor) -> Tensor:
    """Return a contiguous copy in new memory."""
    return x.clone(memory_format=torch.contiguous_format)


def save_state(path: Path, value: Any) -> None:
    """Write numbers, text, None, lists, tuples, mappings with keys of text or numbers, tensors and `SERIALIZABLE`.

    Raises:
        TypeError: the value holds anything else.
    """
    tensors: list[Tensor] = []
    plain = flatten(value, tensors)
    save_file({str(i): fresh(x.cpu()) for i, x in enumerate(tensors)}, path, {"stored": json.dumps(plain)})


def load_state(path: Path, device: torch.device | str = "cpu") -> Any:
    """Read what `save_state` wrote; each tensor is contiguous, in its own aligned memory on a device.

    Raises:
        QuantizeError, ValueError, KeyError, RuntimeError, TypeError: the file is damaged, or another program wrote it.
    """
    header = read_header(path)
    tensors = [read_rows(path, str(i)).to(device) for i in range(len(header.entries))]
    return unflatten(json.loads(header.metadata["stored"]), tensors)


def to_bytes(value: Any) -> bytes:
    """Serialize like `save_state`, for another process, which needs only the values of tensors, not their layout."""
    tensors: list[Tensor] = []
    plain = flatten(value, tensors)
    content: bytes = save({str(i): fresh(x.cpu()) for i, x in enumerate(tensors)}, {"stored": json.dumps(plain)})
    return content


def from_bytes(content: bytes, device: torch.device | str = "cpu") -> Any:
    """Return the value that `to_bytes` was given, with its tensors on a device."""
    tensors = {name: x.to(device) for name, x in load(content).items()}
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return unflatten(json.loads(header["__metadata__"]["stored"]), [tensors[str(i)] for i in range(len(tensors))])


def flatten(value: Any, tensors: list[Tensor]) -> Any:
    """Return JSON for a value, in which numbers stand for its tensors; these are appended to `tensors`."""
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
    """Return the classes whose instances can be stored, by name: `SERIALIZABLE` and their subclasses."""
    found: list[type] = list(SERIALIZABLE)
    for kind in found:
        derived: list[type] = type.__subclasses__(kind)
        found += [x for x in derived if x not in found]
    return {kind.__name__: kind for kind in found}


def unflatten(plain: Any, tensors: list[Tensor]) -> Any:
    """Return the value that `flatten` was given."""
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
