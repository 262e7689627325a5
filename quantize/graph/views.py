"""A view is a parameter as an operand: as it is stored, a part of it, or with its axes in another order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Region = tuple[slice, ...]


@dataclass(frozen=True)
class View:
    """Elements of a contiguous parameter, of which element (i₀, i₁, …) lies at `first + Σ stride · i`.

    Attributes:
        name, shape: the name and the shape of the parameter.
        size, stride, first: which of the parameter's elements the view has, and in which order.
        offset: a number that is added to every element (as in a gain 1 + w).
    """

    name: str
    shape: tuple[int, ...]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    first: int = 0
    offset: float = 0.0

    @classmethod
    def whole(cls, name: str, shape: Sequence[int]) -> View:
        """Return the view of a parameter as it is stored."""
        return cls(name, tuple(shape), tuple(shape), contiguous(shape))

    def moved(self, result: Tensor, base: Tensor) -> View | None:
        """Return the view that an operator made of `base`, a stand-in for this view; None if the operator copied."""
        if result is not base and result._base is not base:
            return None
        return replace(
            self, size=tuple(result.shape), stride=result.stride(), first=self.first + int(result.storage_offset())
        )

    def stand_in(self) -> Tensor:
        """Return a tensor without memory that has the view's sizes and strides."""
        return torch.empty_strided(self.size, self.stride, device="meta")

    def along(self, axis: int) -> tuple[int, slice] | None:
        """Return the parameter's axis that an axis of the view runs along, and which part of it; None if not one."""
        size, step = self.size[axis], self.stride[axis]
        strides = contiguous(self.shape)
        axes = [a for a, s in enumerate(strides) if self.shape[a] > 1 and 0 < s <= step]
        if size == 1 or not axes or step % strides[axes[0]]:
            return None
        step, start = step // strides[axes[0]], self.start(axes[0])
        stop = start + step * (size - 1) + 1
        return (axes[0], slice(start, stop, step)) if stop <= self.shape[axes[0]] else None

    def start(self, axis: int) -> int:
        """Return where along an axis of the parameter, which has elements, the first element lies."""
        return self.first // contiguous(self.shape)[axis] % self.shape[axis]

    def region(self) -> Region | None:
        """Return the part of the parameter that is covered, axis by axis; None if that part is no block, or empty."""
        if 0 in self.size:
            return None
        covered: dict[int, slice] = {a: slice(self.start(a), self.start(a) + 1) for a in range(len(self.shape))}
        axes = (d for d, size in enumerate(self.size) if size > 1 and self.stride[d])
        for axis in sorted(axes, key=lambda d: self.stride[d]):
            found = self.along(axis)
            if found is None:
                return None
            along, part = found
            inner = range(self.shape[along])[covered[along]]
            if len(inner) > 1:  # a further axis of the view runs along it, as heads do along a bias
                if part.step != inner.step * len(inner):
                    return None
                part = slice(inner.start, part.stop + inner[-1] - inner.start, inner.step)
            covered[along] = part
        return tuple(covered.values())


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    return torch.empty(tuple(shape), device="meta").stride()


def disjoint(a: Region, b: Region, shape: Sequence[int]) -> bool:
    """Return whether two parts of a parameter have no element in common."""
    return any(not set(range(n)[x]) & set(range(n)[y]) for x, y, n in zip(a, b, shape, strict=True))


def indices(part: slice, size: int) -> Tensor:
    """Return a slice as int64 indices."""
    return torch.arange(size)[part]


def as_view(result: Any, view: View, base: Tensor) -> Any:
    """Return the views of what an operator returned, a tensor or several."""
    if isinstance(result, Tensor):
        return view.moved(result, base)
    return tuple(as_view(part, view, base) for part in result)
