"""A transform enters the weights: writers absorb T and readers absorb its inverse, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quantize.graph.basis import Basis, Edge
from quantize.kernels.hadamard import hadamard_factors, kronecker_transform

CHUNK = 1 << 20  # numbers that are transformed together


class Transform(Protocol):
    """An invertible matrix T [dim, dim] on a basis, whose channels x become x T. Tensors are [..., dim]."""

    def apply(self, rows: Tensor) -> Tensor:
        """`rows @ T`: what a writer's channels become, and the channels themselves."""

    def apply_inverse_transpose(self, columns: Tensor) -> Tensor:
        """`columns @ T⁻ᵀ`: what a reader's columns become."""

    def invert(self, x: Tensor) -> Tensor:
        """`x @ T⁻¹`."""


@dataclass(frozen=True, eq=False)
class Diagonal:
    """T = diag(d), with d [dim] nowhere zero."""

    d: Tensor

    def apply(self, rows: Tensor) -> Tensor:
        """`rows · d`."""
        return rows * self.d.to(rows)

    def apply_inverse_transpose(self, columns: Tensor) -> Tensor:
        """`columns / d`."""
        return columns / self.d.to(columns)

    invert = apply_inverse_transpose


@dataclass(frozen=True, eq=False)
class GainFold:
    """T = diag(1/g) for a gain g [dim], which becomes ones; readers' columns are multiplied by g, so g may be zero.

    A channel whose gain is zero carries nothing. Its gain becomes one as well, so that the norm admits rotations, and
    the zeros in the readers' columns keep it dead. What it carries in between is arbitrary.
    """

    g: Tensor

    def apply(self, rows: Tensor) -> Tensor:
        """`rows / g`; 1 where the gain is zero."""
        g = self.g.to(rows)
        return torch.where(g == 0, 1, rows / g)

    def apply_inverse_transpose(self, columns: Tensor) -> Tensor:
        """`columns · g`."""
        return columns * self.g.to(columns)

    invert = apply_inverse_transpose


@dataclass(frozen=True, eq=False)
class Rotation:
    """T = diag(signs) (I ⊗ H): a random Hadamard matrix of order `size` on each run of `size` channels.

    Its rows and columns are orthonormal, so T⁻ᵀ = T (QuaRot, arXiv 2404.00456, section 3).
    """

    signs: Tensor
    size: int

    def apply(self, rows: Tensor) -> Tensor:
        """`rows @ T`."""
        a, b = hadamard_factors(self.size)
        return kronecker_transform(rows * self.signs.to(rows), a.to(rows), b.to(rows))

    apply_inverse_transpose = apply

    def invert(self, x: Tensor) -> Tensor:
        """`x @ Tᵀ`."""
        a, b = hadamard_factors(self.size)
        return kronecker_transform(x, a.T.to(x), b.T.to(x)) * self.signs.to(x)


@dataclass(frozen=True, eq=False)
class CentredRotation(Rotation):
    """A rotation that keeps the mean, because T 1 = 1 on each run: a random Hadamard matrix, then a reflection.

    H takes the ones to v = Hᵀ 1, and the reflection that swaps v and 1 takes them back. The entries of T differ from
    those of H by about 1/size.
    """

    def apply(self, rows: Tensor) -> Tensor:
        """`rows @ T`."""
        return self._reflect(super().apply(rows))

    apply_inverse_transpose = apply

    def invert(self, x: Tensor) -> Tensor:
        """`x @ Tᵀ`."""
        return super().invert(self._reflect(x))

    def _reflect(self, x: Tensor) -> Tensor:
        runs = x.unflatten(-1, (-1, self.size))
        ones = torch.ones_like(self.signs)
        u = (ones - super().apply(ones)).to(x).unflatten(-1, (-1, self.size))
        length = (u * u).sum(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        reflected: Tensor = runs - 2 * (runs * u).sum(-1, keepdim=True) / length * u
        return reflected.flatten(-2)


def fold(basis: Basis, transform: Transform, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the changed parameters after a transform of one basis; parameters that are not in `weights` are left out.

    Args:
        basis: the basis that T acts on.
        transform: T, of dimension `basis.dim`.
        weights: parameters by name, of any floating-point dtype, which the results keep.
    """
    folded: dict[str, Tensor] = {}
    for edge, side in sides(basis, transform):
        if edge.parameter in weights:
            folded[edge.parameter] = absorb(folded.get(edge.parameter, weights[edge.parameter]), edge, side)
    return folded


def sides(basis: Basis, transform: Transform) -> Iterator[tuple[Edge, Callable[[Tensor], Tensor]]]:
    """Yield the parameters of a basis, in order, each with what it absorbs of a transform."""
    for edges, side in ((basis.writers, transform.apply), (basis.readers, transform.apply_inverse_transpose)):
        yield from ((edge, side) for edge in edges)


def absorb(weight: Tensor, edge: Edge, side: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply one side of a transform along a parameter's axis in float64, copy by copy and a piece at a time."""
    result = weight.clone(memory_format=torch.contiguous_format)
    part = result[tuple(slice(None) if a == edge.axis else s for a, s in enumerate(edge.region))]
    channels_last = part.movedim(edge.axis, -1)
    rows = max(1, CHUNK // max(1, channels_last[:1].numel()))
    for piece in channels_last.split(rows) if channels_last.dim() > 1 else [channels_last]:
        wide = piece.double() + edge.offset
        for index in edge.index.to(weight.device):
            wide[..., index] = side(wide[..., index])
        piece.copy_(wide - edge.offset)
    return result
