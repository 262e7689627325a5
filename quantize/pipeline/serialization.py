"""Plain data with tensors in it as one safetensors file, which gives the same bits in the same layout back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
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
ALIGNMENT = 64  # bytes; where a tensor starts within them may decide in which order a product is summed


def save_state(path: Path, value: Any) -> None:
    """Write numbers, text, None, lists, tuples, mappings with keys of text or numbers, tensors and `SERIALIZABLE`.

    Raises:
        TypeError: something else is in it.
    """
    tensors: list[Tensor] = []
    plain = flatten(value, tensors)
    windows = Windows.of(tensors)
    header = {"value": plain, "pads": windows.pads, "tensors": [windows.place(x) for x in tensors]}
    save_file({str(i): window for i, window in enumerate(windows.bytes)}, path, {"stored": json.dumps(header)})


def load_state(path: Path) -> Any:
    """What `save_state` was given; each tensor in memory of its own, unless it shared it.

    Raises:
        SafetensorError, ValueError, KeyError, RuntimeError: the file is damaged, or was written by something else.
    """
    with safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {})["stored"])
        windows = [aligned(file.get_tensor(str(i)), pad) for i, pad in enumerate(header["pads"])]
    return unflatten(header["value"], [placed(windows, **place) for place in header["tensors"]])


def to_bytes(value: Any) -> bytes:
    """As `save_state`, for another process, which needs no more than the values of tensors."""
    tensors: list[Tensor] = []
    plain = flatten(value, tensors)
    content: bytes = save(
        {str(i): x.clone().contiguous() for i, x in enumerate(tensors)}, {"stored": json.dumps(plain)}
    )
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


@dataclasses.dataclass
class Windows:
    """The bytes of each storage that some tensors use, from the first to the last.

    Attributes:
        bytes: uint8 [n] for each storage, views.
        pads: how far each starts behind a multiple of `ALIGNMENT`.
        number: address of a storage → its number.
    """

    bytes: list[Tensor]
    pads: list[int]
    number: dict[int, int]

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Windows:
        """Of all that these tensors use."""
        spans: dict[int, tuple[Tensor, int, int]] = {}
        for x in (x for x in tensors if x.numel()):
            start, stop = span(x)
            _, first, last = spans.get(x.untyped_storage().data_ptr(), (x, start, stop))
            spans[x.untyped_storage().data_ptr()] = (x, min(first, start), max(last, stop))
        views = [as_bytes(x, first, last) for x, first, last in spans.values()]
        return cls(views, [view.data_ptr() % ALIGNMENT for view in views], {ptr: i for i, ptr in enumerate(spans)})

    def place(self, x: Tensor) -> dict[str, Any]:
        """Where a tensor lies: dtype, sizes, strides in elements, its window and the bytes in front of it there."""
        shape = {"dtype": str(x.dtype).removeprefix("torch."), "size": list(x.shape), "stride": list(x.stride())}
        if not x.numel():
            return {**shape, "window": -1, "start": 0}
        number = self.number[x.untyped_storage().data_ptr()]
        return {**shape, "window": number, "start": x.data_ptr() - self.bytes[number].data_ptr()}


def span(x: Tensor) -> tuple[int, int]:
    """First byte of its storage that a tensor uses, and the one behind the last."""
    start = int(x.storage_offset()) * x.element_size()
    reach = sum((size - 1) * int(stride) for size, stride in zip(x.shape, x.stride(), strict=True))
    return start, start + (reach + 1) * x.element_size()


def as_bytes(x: Tensor, start: int, stop: int) -> Tensor:
    """uint8 [stop - start], a view of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage(), start, (stop - start,), (1,))


def aligned(window: Tensor, pad: int) -> Tensor:
    """A copy that starts `pad` bytes behind a multiple of `ALIGNMENT`, as torch allocates."""
    copy = torch.empty(pad + len(window), dtype=torch.uint8)[pad:]
    return copy.copy_(window)


def placed(windows: list[Tensor], dtype: str, size: list[int], stride: list[int], window: int, start: int) -> Tensor:
    """A tensor where it lay."""
    empty = torch.empty(0, dtype=getattr(torch, dtype))
    if window < 0:
        return empty.as_strided(size, stride)
    held = windows[window]
    return empty.set_(held.untyped_storage(), (held.storage_offset() + start) // empty.element_size(), size, stride)
