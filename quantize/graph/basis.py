"""Channel bases: where a transform is legal, and which parameters absorb it.

Channels that are added are one channel; channels with the same writers, readers and restrictions form a basis. So a
fused projection falls apart into the ranges that are used differently, with no special case.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx

from quantize.graph.group import Group
from quantize.graph.labels import Event, Walk
from quantize.graph.program import Program
from quantize.graph.rules import visit


@dataclass(frozen=True, eq=False)
class Edge:
    """A parameter that writes or reads a basis.

    Attributes:
        parameter: its name.
        axis: the axis along which it holds channels.
        index: int64 [copies, dim]; `index[c, i]` is where along the axis channel i of the basis lies. Grouped queries
            read every value channel several times, hence the copies.
        vector: a gain, which can only scale.
    """

    parameter: str
    axis: int
    index: Tensor
    vector: bool = False


@dataclass(frozen=True, eq=False)
class Basis:
    """An axis along which channels live.

    Attributes:
        dim: number of channels, in `heads` equal runs that must not mix.
        group: the transforms it admits.
        writers, readers: parameters that absorb T and its inverse.
        pins: what restricts the group, in words.
        gains: norm gains that must be folded into their readers before the group holds.
    """

    index: int
    dim: int
    heads: int
    group: Group
    writers: tuple[Edge, ...]
    readers: tuple[Edge, ...]
    pins: tuple[str, ...]
    gains: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return {
            "dim": self.dim,
            "group": str(self.group),
            "heads": self.heads,
            "pins": list(self.pins),
            "writers": [e.parameter for e in self.writers],
            "readers": [e.parameter for e in self.readers],
            "after_folding": list(self.gains),
        }


@dataclass(frozen=True)
class Bases:
    """What the analysis found.

    Attributes:
        all: the bases in the order in which the graph makes them.
        at: node → (basis, index int64 [size]): position i of the value's last axis carries channel index[i].
    """

    all: tuple[Basis, ...]
    at: dict[fx.Node, tuple[Basis, Tensor]]

    def reading(self, parameter: str) -> Basis | None:
        """The basis that a parameter reads, if it reads one and nothing else."""
        found = [b for b in self.all if any(e.parameter == parameter for e in b.readers)]
        return found[0] if len(found) == 1 else None


def find_bases(program: Program, folded: frozenset[str] = frozenset()) -> Bases:
    """Walk the graph once and sort its channels into bases.

    Args:
        program: the exported model.
        folded: gains to count as ones.
    """
    walk = Walk(program.parameters, folded)
    for segment in program.segments:
        for node in segment.nodes:
            visit(walk, node)
    for value in program.output.all_input_nodes:
        walk.pin(value, "it is an output of the model")
    pin_shared(walk)
    return assemble(walk)


def pin_shared(walk: Walk) -> None:
    """A parameter that several nodes read would have to absorb several transforms at once."""
    shared = {name for placeholder, name in walk.parameters.items() if len(placeholder.users) > 1}
    for event in [e for e in walk.events if e.parameter in shared]:
        walk.restrict(event.channels, Group.NONE, f"`{event.parameter}` is used more than once")


def admissible_bases(program: Program) -> tuple[Basis, ...]:
    """All bases, those behind norm gains with the group they have once the gains are folded into their readers."""
    found = find_bases(program)
    gains = frozenset(b.writers[0].parameter for b in found.all if is_foldable(b))
    folded = {tuple(e.parameter for e in b.writers): b for b in find_bases(program, gains).all}
    return tuple(unlocked(b, folded.get(tuple(e.parameter for e in b.writers)), gains) for b in found.all)


def is_foldable(basis: Basis) -> bool:
    """Whether a norm gain writes the basis and linears read it, so that they can absorb the gain."""
    only_gain = len(basis.writers) == 1 and basis.writers[0].vector
    return (
        only_gain and Group.DIAGONAL in basis.group and not any(e.vector for e in basis.readers) and bool(basis.readers)
    )


def unlocked(basis: Basis, folded: Basis | None, gains: frozenset[str]) -> Basis:
    """The basis as it is once its gains are folded, with their names."""
    needed = tuple(e.parameter for e in basis.readers if e.parameter in gains)
    return replace(folded, index=basis.index, gains=needed) if folded and needed else basis


def assemble(walk: Walk) -> Bases:
    """Components of channels that are one, then classes of components that are used alike."""
    allocation = np.array(walk.allocation)
    component, self_joined = components(walk, allocation)
    events = [*walk.events, *self_joined]
    hashes = signatures(component, events)
    blocks = signatures(component, events, of_blocks=True)
    first = np.full(len(hashes), len(allocation))
    np.minimum.at(first, component, np.arange(len(allocation)))
    order = np.lexsort((first, first_of_class(blocks, first), first_of_class(hashes, first)))
    rank = np.empty_like(order)  # rank: component → place in that order
    rank[order] = np.arange(len(order))
    starts = np.flatnonzero(np.diff(hashes[order], prepend=~hashes[order[:1]]))
    return build(walk, events, rank[component], starts, blocks[order])


def components(walk: Walk, allocation: np.ndarray) -> tuple[np.ndarray, list[Event]]:
    """For each channel the number of its component; channels of one value that meet one another stay apart, pinned."""
    count = len(allocation)
    a, b = torch.cat(walk.joined, dim=1).numpy() if walk.joined else np.empty((2, 0), dtype=np.int64)
    component = connected_components(coo_array((np.ones(len(a)), (a, b)), shape=(count, count)), directed=False)[1]
    pairs, counts = np.unique(np.stack([component, allocation]), axis=1, return_counts=True)
    mixed = np.isin(component, pairs[0][counts > 1])
    if not mixed.any():
        return component, []
    apart = np.unique(np.where(mixed, count + np.arange(count), component), return_inverse=True)[1]
    event = Event(torch.from_numpy(np.flatnonzero(mixed)), Group.NONE, "channels of it are added to one another")
    return apart, [event]


def signatures(component: np.ndarray, events: list[Event], of_blocks: bool = False) -> np.ndarray:
    """A 64-bit hash for each component of the events (or of the blocks within events) that touch it.

    A parameter counts as often as it touches the component, a restriction once.
    """
    rng, result = np.random.default_rng(0), np.zeros(component.max(initial=-1) + 1, dtype=np.uint64)
    for event in events:
        touched, blocks = component[event.channels.reshape(-1).numpy()], np.zeros(1, dtype=np.int64)
        if of_blocks and event.blocks is None:
            continue
        if of_blocks and event.blocks is not None:
            touched, blocks = np.unique(np.stack([touched, event.blocks.reshape(-1).numpy()]), axis=1)
        elif not event.parameter:
            touched = np.unique(touched)
        salt = rng.integers(1 << 63, size=blocks.max(initial=0) + 1, dtype=np.uint64)
        np.add.at(result, touched, salt[blocks])
    return result


def first_of_class(hashes: np.ndarray, first: np.ndarray) -> np.ndarray:
    """For each component the first channel of its class, so that classes sort in graph order."""
    classes, inverse = np.unique(hashes, return_inverse=True)
    lowest = np.full(len(classes), first.max(initial=0))
    np.minimum.at(lowest, inverse, first)
    return lowest[inverse]


def build(walk: Walk, events: list[Event], rank: np.ndarray, starts: np.ndarray, blocks: np.ndarray) -> Bases:
    """Bases from sorted components: basis b holds the ranks from starts[b] to starts[b + 1]."""
    ends = np.append(starts[1:], len(blocks))
    of_channel = torch.from_numpy(np.searchsorted(starts, rank, side="right") - 1)
    place = torch.from_numpy(rank - starts[of_channel.numpy()])
    touching: list[list[Event]] = [[] for _ in starts]
    for event in events:
        for b in of_channel[event.channels.reshape(-1)].unique().tolist():
            touching[b].append(event)
    bases = tuple(
        make_basis(b, touching[b], of_channel, place, blocks[start:end])
        for b, (start, end) in enumerate(zip(starts, ends, strict=True))
    )
    at = {
        node: (bases[int(of_channel[ids[0]])], place[ids])
        for node, ids in walk.at.items()
        if bool((of_channel[ids] == of_channel[ids[0]]).all())
    }
    return Bases(bases, at)


def make_basis(index: int, events: list[Event], of_channel: Tensor, place: Tensor, blocks: np.ndarray) -> Basis:
    """One basis from the events that touch it."""
    dim, starts = len(blocks), np.flatnonzero(np.diff(blocks, prepend=~blocks[:1]))
    heads = len(starts) if len(set(np.diff(np.append(starts, dim)))) == 1 else dim
    edges = [(e, make_edge(e, of_channel[e.channels] == index, place, dim)) for e in events if e.parameter]
    return Basis(
        index,
        dim,
        heads,
        functools.reduce(operator.and_, (e.group for e in events), Group.LINEAR),
        tuple(edge for e, edge in edges if not e.reads),
        tuple(edge for e, edge in edges if e.reads),
        tuple(dict.fromkeys(e.reason for e in events if e.reason)),
    )


def make_edge(event: Event, here: Tensor, place: Tensor, dim: int) -> Edge:
    """Where along the parameter's axis the channels of one basis lie, copy by copy."""
    positions = here.nonzero()[:, 0]
    by_channel = positions[place[event.channels[positions]].argsort(stable=True)]
    return Edge(event.parameter, event.axis, by_channel.reshape(dim, -1).T.contiguous(), event.vector)
