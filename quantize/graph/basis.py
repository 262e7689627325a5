"""The analysis answers with channel bases."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from quantize.graph.allowed_transforms import AllowedTransforms
from quantize.graph.views import Region


@dataclass(frozen=True, eq=False)
class Edge:
    """A parameter that writes or reads a basis.

    Attributes:
        parameter: the parameter's name.
        axis: the axis along which the parameter holds channels.
        index: int64 [copies, dim]; `index[c, i]` is where along the axis channel i of the basis lies. Grouped queries
            read every value channel several times, hence the copies.
        vector: whether the parameter is a gain, which can only scale.
        offset: the gain is the parameter plus this number.
        region: the part of the parameter that takes part, an index for each axis; empty for all of it.
        dual: whether the parameter writes channels that others are multiplied with (keys), so that it absorbs T⁻ᵀ as a
            reader does.
    """

    parameter: str
    axis: int
    index: Tensor
    vector: bool = False
    offset: float = 0.0
    region: Region = ()
    dual: bool = False


@dataclass(frozen=True, eq=False)
class Basis:
    """An axis along which channels live.

    Attributes:
        dim: the number of channels, which form `heads` equal runs that must not mix.
        allowed: the transforms that the basis admits.
        writers, readers: the parameters that absorb T and those that absorb its inverse.
        pins: what restricts them, in words.
        gains: norm gains that must be folded into their readers before `allowed` holds.
    """

    index: int
    dim: int
    heads: int
    allowed: AllowedTransforms
    writers: tuple[Edge, ...]
    readers: tuple[Edge, ...]
    pins: tuple[str, ...]
    gains: tuple[str, ...] = ()

    @property
    def gain(self) -> Edge | None:
        """The norm gain that writes the basis and that its readers can absorb, if there is one."""
        scaled = [e for e in self.writers if e.vector]
        linear = bool(self.readers) and not any(e.vector or e.dual for e in self.readers)
        return scaled[0] if len(scaled) == 1 and linear and AllowedTransforms.DIAGONAL in self.allowed else None

    def as_dict(self) -> dict[str, object]:
        """Return plain data for JSON."""
        return {
            "dim": self.dim,
            "allowed": str(self.allowed),
            "heads": self.heads,
            "pins": list(self.pins),
            "writers": [e.parameter for e in self.writers],
            "readers": [e.parameter for e in self.readers if not e.dual],
            "paired": [e.parameter for e in self.readers if e.dual],
            "after_folding": list(self.gains),
        }


@dataclass(frozen=True, eq=False)
class Placement:
    """Where the channels of a value lie.

    Attributes:
        axes: the axes of the value along which the channel changes.
        ids: int64 [size]; along these axes, taken as one flattened axis, element i carries channel ids[i].
        basis, place: the basis of each channel, and its place in the basis.
    """

    axes: tuple[int, ...]
    ids: Tensor
    basis: Tensor
    place: Tensor

    def of(self, basis: Basis) -> Tensor | None:
        """Return where the channels of one basis lie, int64 [copies, dim]; None if not all are there equally often."""
        here = (self.basis[self.ids] == basis.index).nonzero()[:, 0]
        place = self.place[self.ids[here]]
        order, counts = here[place.argsort(stable=True)], torch.bincount(place, minlength=basis.dim)
        return order.reshape(basis.dim, -1).T if len(here) and bool((counts == counts[0]).all()) else None


@dataclass(frozen=True)
class Bases:
    """The bases that the analysis found.

    Attributes:
        all: the bases in the order in which the graph makes them.
        at: node → where the channels of its value lie.
    """

    all: tuple[Basis, ...]
    at: dict[fx.Node, Placement]

    def reading(self, parameter: str) -> Basis | None:
        """Return the basis that a linear's weight reads, if it reads one and nothing else."""
        found = [b for b in self.all if any(e.parameter == parameter and not e.dual for e in b.readers)]
        return found[0] if len(found) == 1 else None
