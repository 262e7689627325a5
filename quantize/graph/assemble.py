"""A walk becomes bases: channels that are one are joined, and channels that are used alike form a class."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from quantize.graph.allowed_transforms import AllowedTransforms
from quantize.graph.basis import Bases, Basis, Edge, Placement
from quantize.graph.labels import ChannelTrace, ChannelUse


@dataclass(frozen=True)
class Channels:
    """The component of each channel, and how the channel belongs to it.

    Attributes:
        component: int64, the number of the component; channels of one component are transformed as one.
        dual: whether T⁻ᵀ acts on the channel where T acts on the component.
        copy: which of several copies the channel is; a value may hold a component several times (grouped queries,
            halves that are rotated against each other).
        value: the number of the value that the channel was made for.
        itself: whether plain and dual channels of the component meet, so that T must equal T⁻ᵀ.
    """

    component: np.ndarray
    dual: np.ndarray
    copy: np.ndarray
    value: np.ndarray
    itself: np.ndarray

    @property
    def side(self) -> np.ndarray:
        """Return dual and copy as one number."""
        return np.asarray(self.copy * 2 + self.dual)


def assemble(walk: ChannelTrace) -> Bases:
    """Find components of channels that are one, and then classes of components that are used alike."""
    channels = find_components(walk)
    itself = torch.from_numpy(np.flatnonzero(channels.itself))
    events = [*walk.events, ChannelUse(itself, AllowedTransforms.ORTHOGONAL, "it is multiplied with itself")]
    hashes = signatures(channels, events) + meetings(channels, [*walk.joined, *walk.paired])
    blocks = block_signatures(channels.component, events)
    first = np.full(len(hashes), walk.count)
    np.minimum.at(first, channels.component, np.arange(walk.count))
    order = np.lexsort((first, first_of_class(blocks, first), first_of_class(hashes, first)))
    rank = np.empty_like(order)  # rank: component → place in that order
    rank[order] = np.arange(len(order))
    starts = np.flatnonzero(np.diff(hashes[order], prepend=~hashes[order[:1]]))
    return build(walk, events, channels, rank[channels.component], starts, blocks[order])


def find_components(walk: ChannelTrace) -> Channels:
    """Sort channels into components.

    Every channel is taken twice, plain and dual. A sum joins plain with plain and dual with dual; a product joins plain
    with dual.
    """
    count, (joined, paired) = walk.count, (pairs(found) for found in (walk.joined, walk.paired))
    a = np.concatenate([joined[0], joined[0] + count, paired[0], paired[0] + count])
    b = np.concatenate([joined[1], joined[1] + count, paired[1] + count, paired[1]])
    both = connected_components(coo_array((np.ones(len(a)), (a, b)), shape=(2 * count, 2 * count)), directed=False)[1]
    plain, twin = both[:count], both[count:]
    lowest = np.minimum(plain, twin)
    component = (np.cumsum(np.bincount(lowest) > 0) - 1)[lowest]
    dual, value = plain > twin, np.repeat(np.arange(len(walk.sizes)), walk.sizes)
    several = np.flatnonzero(np.bincount(component)[component] > 1)
    copy = np.zeros(count, dtype=np.int64)
    copy[several] = occurrence(((component * 2 + dual) * len(walk.sizes) + value)[several])
    return Channels(component, dual, copy, value, plain == twin)


def occurrence(keys: np.ndarray) -> np.ndarray:
    """Return for each element how many equal ones stand before it."""
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order], prepend=-1))
    counted = np.empty_like(keys)
    counted[order] = np.arange(len(keys)) - np.repeat(starts, np.diff(np.append(starts, len(keys))))
    return counted


def pairs(found: list[Tensor]) -> np.ndarray:
    """Join a list of pairs, int64 [2, n] each, to one int64 [2, count]."""
    return torch.cat(found, dim=1).numpy() if found else np.empty((2, 0), dtype=np.int64)


def signatures(channels: Channels, events: list[ChannelUse]) -> np.ndarray:
    """Return a 64-bit hash for each component of the events that touch it, and on which side they do.

    A parameter and a sum over channels count as often as they touch the component; another restriction counts once.
    """
    rng, result = np.random.default_rng(0), np.zeros(channels.component.max(initial=-1) + 1, dtype=np.uint64)
    side = channels.side
    for event in events:
        ids = event.channels.reshape(-1).numpy()
        if not event.parameter and not event.counted:
            ids = distinct(ids)
        salt = rng.integers(1 << 63, size=side[ids].max(initial=0) + 1, dtype=np.uint64)
        np.add.at(result, channels.component[ids], salt[side[ids]])
    return result


def meetings(channels: Channels, found: list[Tensor]) -> np.ndarray:
    """Return a 64-bit hash for each component of where its copies meet, which must be alike within a class."""
    rng, result = np.random.default_rng(2), np.zeros(channels.component.max(initial=-1) + 1, dtype=np.uint64)
    for a, b in (pair.numpy() for pair in found):
        if channels.copy[a].any() or channels.copy[b].any():
            ends = (channels.value[a], channels.copy[a], channels.value[b], channels.copy[b])
            kind = np.zeros(len(a), dtype=np.uint64)
            for end, salt in zip(ends, rng.integers(1 << 63, size=len(ends), dtype=np.uint64), strict=True):
                kind += scrambled(end, salt)
            np.add.at(result, channels.component[a], scrambled(kind, np.uint64(0)))
    return result


def block_signatures(component: np.ndarray, events: list[ChannelUse]) -> np.ndarray:
    """Return a 64-bit hash for each component of the blocks that it lies in."""
    rng, result = np.random.default_rng(1), np.zeros(component.max(initial=-1) + 1, dtype=np.uint64)
    for event in (e for e in events if e.blocks is not None):
        touched, salt = component[event.channels.reshape(-1).numpy()], rng.integers(1 << 63, dtype=np.uint64)
        np.add.at(result, touched, scrambled(event.blocks.reshape(-1).numpy(), salt))  # type: ignore[union-attr]
    return result


def distinct(ids: np.ndarray) -> np.ndarray:
    """Return the distinct values, sorted, of ids that lie close together."""
    if not len(ids):
        return ids
    low = int(ids.min())
    return np.flatnonzero(np.bincount(ids - low)) + low


def scrambled(x: np.ndarray, salt: np.uint64) -> np.ndarray:
    """Return a 64-bit hash of each integer (the finalizer of SplitMix64, Steele et al. 2014)."""
    z = x.astype(np.uint64) + salt
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


def first_of_class(hashes: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Return for each component the first channel of its class, so that classes sort in graph order."""
    classes, inverse = np.unique(hashes, return_inverse=True)
    lowest = np.full(len(classes), first.max(initial=0))
    np.minimum.at(lowest, inverse, first)
    return lowest[inverse]


def build(
    walk: ChannelTrace,
    events: list[ChannelUse],
    channels: Channels,
    rank: np.ndarray,
    starts: np.ndarray,
    blocks: np.ndarray,
) -> Bases:
    """Build bases from sorted components; basis b holds the ranks from starts[b] to starts[b + 1]."""
    of_channel = np.searchsorted(starts, rank, side="right") - 1
    place = rank - starts[of_channel]
    touching: list[list[ChannelUse]] = [[] for _ in starts]
    for event in events:
        for b in np.flatnonzero(np.bincount(of_channel[event.channels.reshape(-1).numpy()])):
            touching[b].append(event)
    ends = np.append(starts[1:], len(blocks))
    bases = tuple(
        make_basis(b, touching[b], (of_channel, place, channels), blocks[start:end])
        for b, (start, end) in enumerate(zip(starts, ends, strict=True))
    )
    found = torch.from_numpy(of_channel), torch.from_numpy(place)
    at = {node: Placement(axes, ids, *found) for node, (axes, ids) in walk.at.items()}
    return Bases(bases, at)


Where = tuple[np.ndarray, np.ndarray, Channels]  # for each channel its basis, its place in it, and its component


def make_basis(index: int, events: list[ChannelUse], where: Where, blocks: np.ndarray) -> Basis:
    """Build one basis from the events that touch it."""
    dim, starts = len(blocks), np.flatnonzero(np.diff(blocks, prepend=~blocks[:1]))
    heads = len(starts) if len(set(np.diff(np.append(starts, dim)))) == 1 else dim
    allowed = functools.reduce(operator.and_, (e.allowed for e in events), AllowedTransforms.LINEAR)
    writers: list[Edge] = []
    readers: list[Edge] = []
    for event in (e for e in events if e.parameter):
        for dual in (False, True):
            ids = event.channels.numpy()
            here = np.flatnonzero((where[0][ids] == index) & (where[2].dual[ids] == dual))
            if len(here):
                (readers if event.reads is not dual else writers).append(make_edge(event, here, dual, where, dim))
    reasons = [e.reason for e in events if e.reason]
    if heads == dim and allowed & AllowedTransforms.ORTHOGONAL:
        allowed &= AllowedTransforms.DIAGONAL
        reasons.append("factors or heads set each of its channels apart from the others")
    return Basis(index, dim, heads, allowed, tuple(writers), tuple(readers), tuple(dict.fromkeys(reasons)))


def make_edge(event: ChannelUse, here: np.ndarray, dual: bool, where: Where, dim: int) -> Edge:
    """Build the edge that says where along the parameter's axis the channels of one basis lie, copy by copy."""
    ids = event.channels.numpy()[here]
    here = here[np.lexsort((here, where[2].copy[ids], where[1][ids]))]
    assert event.positions is not None  # every event of a parameter has positions
    index = event.positions[here].reshape(dim, -1).T.contiguous()
    return Edge(event.parameter, event.axis, index, event.vector, event.offset, event.region, dual and not event.reads)
