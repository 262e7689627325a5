"""A pretended accelerator: tensors say that they are on `pretend:0`, and numbers are computed on the CPU.

Mixing its tensors with those of the CPU is an error, as on a real device; what moves and what is alive is counted. It
registers a backend of torch, which one process can do once, so tests use it in a process of their own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretend"
ATEN = torch.ops.aten
CPU_INDICES = {ATEN.index.Tensor, ATEN.index_put_.default}  # which a device takes from the CPU


@dataclass
class Traffic:
    """What moved to the device and back, in bytes; what is alive there; and how often a number was read."""

    to_device: int = 0
    to_cpu: int = 0
    alive: int = 0
    peak: int = 0
    scalars: int = 0
    seen: set[int] = field(default_factory=set)

    def hold(self, x: torch.Tensor) -> None:
        """Count a tensor's memory until it is freed."""
        storage = x.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key and key not in self.seen:
            self.seen.add(key)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.alive -= size
        self.seen.discard(key)


TRAFFIC = Traffic()


class PretendTensor(torch.Tensor):
    """A tensor of the device, with its numbers in a tensor of the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> PretendTensor:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device(NAME, 0), requires_grad=False,
        )  # fmt: skip
        made.inner = inner
        TRAFFIC.hold(inner)
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class Pretended(TorchDispatchMode):
    """While it is entered, the device exists."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def dispatch(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator of torch on the CPU's tensors behind its arguments."""
    named = kwargs.get("device")
    target = None if named is None else torch.device(named).type
    if func is ATEN._to_copy.default:
        return converted(args[0], target, kwargs)
    if func is ATEN.copy_.default:
        return copied(*args[:2])
    if func is ATEN._local_scalar_dense.default and isinstance(args[0], PretendTensor):
        TRAFFIC.scalars += 1
    leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    here = [x for x in leaves if isinstance(x, PretendTensor)]
    if here and any(not isinstance(x, PretendTensor) and x.dim() for x in leaves) and func not in CPU_INDICES:
        raise RuntimeError(f"{func}: tensors on {NAME}:0 and cpu")
    if target is not None:
        kwargs = {
            **{k: v for k, v in kwargs.items() if k != "pin_memory"},
            "device": "meta" if target == "meta" else "cpu",
        }
    made = func(*tree_map(inner, args), **tree_map(inner, kwargs))
    if target != NAME and (not here or target is not None):
        return made
    known = {id(x.inner): x for x in here}  # in-place results stay the same objects
    return tree_map(lambda x: known.get(id(x), wrapped(x)), made)


def converted(x: torch.Tensor, target: str | None, kwargs: dict[str, Any]) -> torch.Tensor:
    """Copy a tensor to another dtype or device, or both."""
    rest = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking", "layout", "pin_memory")}
    made: torch.Tensor = ATEN._to_copy.default(inner(x), **rest)
    target = target or x.device.type
    count(made, isinstance(x, PretendTensor), target == NAME)
    return PretendTensor(made) if target == NAME else made


def copied(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Copy a tensor's numbers into another tensor."""
    inner(target).copy_(inner(source))
    count(source, isinstance(source, PretendTensor), isinstance(target, PretendTensor))
    return target


def count(x: torch.Tensor, before: bool, after: bool) -> None:
    """Count the bytes of a tensor that changes sides; others may have no size yet, while a graph is exported."""
    if after and not before:
        TRAFFIC.to_device += x.nbytes
    if before and not after:
        TRAFFIC.to_cpu += x.nbytes


def inner(x: Any) -> Any:
    """Return the CPU's tensor behind one of the device."""
    return x.inner if isinstance(x, PretendTensor) else x


def wrapped(x: Any) -> Any:
    """Return a tensor of the device for one of the CPU."""
    return PretendTensor(x) if isinstance(x, torch.Tensor) and not isinstance(x, PretendTensor) else x


def register() -> None:
    """Make the device known to torch; once in a process."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("aten", "IMPL")

    def strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> torch.Tensor:
        return PretendTensor(torch.empty_strided(size, stride, dtype=dtype))

    def empty(size: Any, *, dtype: Any = None, **_: Any) -> torch.Tensor:
        return PretendTensor(torch.empty(size, dtype=dtype))

    library.impl("empty_strided", strided, "PrivateUse1")
    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("_copy_from", lambda source, target, non_blocking=False: copied(target, source), "PrivateUse1")
    globals()["_library"] = library  # the operators last as long as the library
