"""Which channel each element of a tensor carries: labels, moved by the graph's own data-movement operators."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from quantize.graph.group import Group


@dataclass(frozen=True)
class Event:
    """Something that happens to channels: a parameter writes or reads them, or an operator restricts their group.

    Attributes:
        channels: int64 ids, one for each index of the parameter's axis, or the channels restricted.
        group: what the event leaves of the admissible group.
        reason: why, in words; empty where nothing is restricted.
        parameter, axis: what writes or reads, along which axis; empty for a mere restriction.
        reads: the parameter reads the channels (it writes them otherwise).
        vector: the parameter is one-dimensional along its axis and can only scale (a gain).
        blocks: for each channel the block (attention head) outside of which it must not mix, or None.
    """

    channels: Tensor
    group: Group = Group.LINEAR
    reason: str = ""
    parameter: str = ""
    axis: int = 0
    reads: bool = False
    vector: bool = False
    blocks: Tensor | None = None


@dataclass
class Walk:
    """One walk over a graph: channel labels of its values, and what was found on the way.

    Attributes:
        parameters: placeholder → parameter name.
        folded: gains that count as ones, since a pass has folded them away.
        labels: node → int64 ids in the shape of its value (example sizes); a node without channels has none.
        squares: node → labels of the value it is the square of.
        joined: pairs of ids that are one channel, since their values are added.
        allocation: for each id the number of the value that it was made for.
        at: node → ids along its last axis, kept for every value whose labels vary along that axis only.
    """

    parameters: dict[fx.Node, str]
    folded: frozenset[str] = frozenset()
    labels: dict[fx.Node, Tensor] = field(default_factory=dict)
    squares: dict[fx.Node, Tensor] = field(default_factory=dict)
    joined: list[Tensor] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    allocation: list[int] = field(default_factory=list)
    at: dict[fx.Node, Tensor] = field(default_factory=dict)

    def fresh(self, node: fx.Node) -> Tensor:
        """New channels along the last axis of a node's value, written to `labels`; returns their ids."""
        shape, first = shape_of(node), len(self.allocation)
        number = self.allocation[-1] + 1 if self.allocation else 0
        self.allocation += [number] * shape[-1]
        ids = torch.arange(first, first + shape[-1])
        self.labels[node] = ids.expand(shape)
        return ids

    def restrict(self, labels: Tensor, group: Group, reason: str, blocks: Tensor | None = None) -> None:
        """Leave the channels of a label tensor at most `group`."""
        self.events.append(Event(labels.unique() if blocks is None else labels, group, reason, blocks=blocks))

    def pin(self, node: fx.Node, reason: str) -> None:
        """Rule out every transform of the channels of a node's value; no channels, nothing to do."""
        for labels in (self.labels.get(node), self.squares.get(node)):
            if labels is not None:
                self.restrict(labels, Group.NONE, reason)

    def parameter(self, node: Any) -> str | None:
        """Name of the parameter that an argument is, if it is one."""
        return self.parameters.get(node) if isinstance(node, fx.Node) else None


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of a node's value at the example sizes."""
    return tuple(concrete(size) for size in node.meta["val"].shape)


def concrete(value: Any) -> Any:
    """A symbolic size at the example sizes."""
    return int(value.node.hint) if isinstance(value, torch.SymInt) else value


def move(walk: Walk, node: fx.Node) -> Any:
    """Run a data-movement operator on labels instead of values."""

    def substitute(n: fx.Node) -> Any:
        return walk.labels[n] if n in walk.labels else concrete(n.meta["val"])

    args, kwargs = map_arg(node.args, substitute), map_arg(node.kwargs, substitute)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def last_axis(labels: Tensor) -> Tensor | None:
    """The ids along the last axis if no other axis changes them, else None."""
    if not labels.numel():
        return None
    rows = labels.reshape(-1, labels.shape[-1])
    return rows[0].clone() if bool((rows == rows[0]).all()) else None


def channel_axes(labels: Tensor) -> list[int]:
    """Axes along which the channel changes."""
    return [d for d in range(labels.dim()) if bool((labels != labels.narrow(d, 0, 1)).any())]


def axis_index(labels: Tensor, axis: int) -> Tensor:
    """For each element its index along an axis."""
    shape = [-1 if d == axis else 1 for d in range(labels.dim())]
    return torch.arange(labels.shape[axis]).reshape(shape).expand(labels.shape)
