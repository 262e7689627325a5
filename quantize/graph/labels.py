"""Labels say which channel each element of a tensor carries; the graph's own data-movement operators move them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from quantize.graph.allowed_transforms import AllowedTransforms
from quantize.graph.views import Region, View, indices


@dataclass(frozen=True)
class ChannelUse:
    """Something that happens to channels: a parameter writes or reads them, or an operator restricts their transforms.

    Attributes:
        channels: int64 ids, one for each index of the parameter's axis that takes part, or of the channels restricted.
        allowed: the transforms that the event leaves admissible.
        reason: why they are restricted, in words; empty if nothing is restricted.
        parameter, axis: the parameter that writes or reads, and along which axis; empty for a mere restriction.
        reads: whether the parameter reads the channels; otherwise it writes them.
        vector: whether the parameter is one-dimensional along its axis and can only scale (a gain).
        offset: the gain is the parameter plus this number.
        positions: where along the parameter's axis the channels lie.
        region: the part of the parameter that takes part.
        blocks: for each channel the block (attention head) outside of which it must not mix; None for no blocks.
        counted: whether a channel counts as often as it occurs (in a sum over channels); otherwise it counts once.
    """

    channels: Tensor
    allowed: AllowedTransforms = AllowedTransforms.LINEAR
    reason: str = ""
    parameter: str = ""
    axis: int = 0
    reads: bool = False
    vector: bool = False
    offset: float = 0.0
    positions: Tensor | None = None
    region: Region = ()
    blocks: Tensor | None = None
    counted: bool = False


@dataclass
class ChannelTrace:
    """One walk over a graph: channel labels of its values, and what was found on the way.

    Attributes:
        parameters: placeholder → parameter name.
        folded: gains that count as ones, since a pass has folded them away.
        labels: node → int64 ids in the shape of its value (at the example sizes); a node without channels has none.
        squares, means: node → the labels of the value whose square, or whose mean over channels, the node is.
        views: node → the parameter, or the part of one, that the node is; for several results a tuple.
        joined: pairs of ids that are one channel, because their values are added.
        paired: pairs of ids that are multiplied and summed up, so that T⁻ᵀ must do to one what T does to the other.
        sizes: the number of channels of each value that channels were made for; ids count on from one to the next.
        uses: parameter → the nodes that use it, each with the part that takes part.
        accounted: pairs (node, parameter) where a rule has dealt with the node's use of the parameter.
        at: node → the axes along which its channels lie, and the ids along them.
    """

    parameters: dict[fx.Node, str]
    folded: frozenset[str] = frozenset()
    labels: dict[fx.Node, Tensor] = field(default_factory=dict)
    squares: dict[fx.Node, Tensor] = field(default_factory=dict)
    means: dict[fx.Node, Tensor] = field(default_factory=dict)
    views: dict[fx.Node, Any] = field(default_factory=dict)
    joined: list[Tensor] = field(default_factory=list)
    paired: list[Tensor] = field(default_factory=list)
    events: list[ChannelUse] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    uses: dict[str, list[tuple[fx.Node, Region]]] = field(default_factory=dict)
    accounted: set[tuple[fx.Node, str]] = field(default_factory=set)
    at: dict[fx.Node, tuple[tuple[int, ...], Tensor]] = field(default_factory=dict)
    count: int = 0

    def __post_init__(self) -> None:
        self.views |= {node: View.whole(name, shape_of(node)) for node, name in self.parameters.items()}

    def fresh(self, node: fx.Node, axis: int = -1) -> Tensor:
        """Make new channels along an axis of a node's value, write them to `labels`, and return their ids."""
        shape = shape_of(node)
        ids = self.fresh_ids(shape[axis])
        self.labels[node] = along_axis(ids, axis % len(shape), len(shape)).expand(shape)
        return ids

    def fresh_ids(self, count: int) -> Tensor:
        """Make new channels and return their ids, int64 [count]."""
        ids = torch.arange(self.count, self.count + count)
        self.sizes.append(count)
        self.count += count
        return ids

    def restrict(
        self,
        labels: Tensor,
        allowed: AllowedTransforms,
        reason: str,
        blocks: Tensor | None = None,
        counted: bool = False,
    ) -> None:
        """Leave the channels of a label tensor at most `allowed`; `blocks` is of its shape."""
        for axis in set(range(labels.dim())) - set(channel_axes(labels)):
            labels = labels.narrow(axis, 0, 1)
            blocks = blocks if blocks is None else blocks.narrow(axis, 0, 1)
        self.events.append(ChannelUse(labels.reshape(-1), allowed, reason, blocks=blocks, counted=counted))

    def pin(self, node: fx.Node, reason: str) -> None:
        """Rule out every transform of the channels of a node's value, if it has any."""
        for labels in (self.labels.get(node), self.squares.get(node), self.means.get(node)):
            for one in labels if isinstance(labels, list | tuple) else [labels]:
                if one is not None:
                    self.restrict(one, AllowedTransforms.NONE, reason)

    def pin_derived(self, node: fx.Node, reason: str) -> None:
        """Pin the channels whose square or mean a node's value is."""
        if node not in self.labels:
            self.pin(node, reason)

    def touches(self, node: fx.Node) -> bool:
        """Return whether a node's value has channels, or is the square or the mean of channels."""
        return node in self.labels or node in self.squares or node in self.means

    def use(self, node: fx.Node, view: View, axis: int, ids: Tensor, reads: bool = False, gain: str = "") -> None:
        """Note that an axis of a parameter (or of a part of it) reads or writes channels.

        Args:
            node: the node that uses the parameter.
            view, axis: the parameter, and the axis of the view.
            ids: the channels, one for each index of that axis.
            reads: whether the parameter reads the channels; otherwise it writes them.
            gain: why the parameter can only scale the channels; empty if it can mix them.
        """
        region, along = view.region(), view.along(axis)
        if along is None or region is None or len(ids) != view.size[axis] or region[along[0]] != along[1]:
            return self.restrict(
                ids, AllowedTransforms.NONE, f"`{view.name}` is used in another shape than it is stored in"
            )
        allowed, positions = (
            AllowedTransforms.DIAGONAL if gain else AllowedTransforms.LINEAR,
            indices(along[1], view.shape[along[0]]),
        )
        self.events.append(
            ChannelUse(ids, allowed, gain, view.name, along[0], reads, bool(gain), view.offset, positions, region)
        )
        self.uses.setdefault(view.name, []).append((node, region))
        self.accounted.add((node, view.name))

    def merge_equal(self, labels: Tensor, axis: int = -1) -> Tensor:
        """Return one id for each index of an axis; join the rest, as a parameter along the axis treats them alike."""
        rows = labels.movedim(axis, -1)
        for d in range(rows.dim() - 1):
            if d not in channel_axes(rows):
                rows = rows.narrow(d, 0, 1)
        rows = rows.reshape(-1, rows.shape[-1])
        if len(rows) > 1:
            self.joined.append(id_pairs(rows[:1].expand_as(rows[1:]), rows[1:]))
        return rows[0].clone()

    def view(self, node: Any) -> View | None:
        """Return the parameter, or the part of one, that an argument is."""
        found = self.views.get(node) if isinstance(node, fx.Node) else None
        return found if isinstance(found, View) else None


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a node's value at the example sizes."""
    return tuple(concrete(size) for size in node.meta["val"].shape)


def concrete(value: Any) -> Any:
    """Return a symbolic size at the example sizes; one that depends on data is taken as 2."""
    if not isinstance(value, torch.SymInt):
        return value
    if value.node.has_hint():
        return int(value.node.hint)
    expression, known = value.node.expr, value.node.shape_env.replacements
    return int(expression.xreplace(known).xreplace(dict.fromkeys(expression.free_symbols, 2)))


def move(walk: ChannelTrace, node: fx.Node) -> Any:
    """Run a data-movement operator on labels instead of values."""

    def substitute(n: fx.Node) -> Any:
        return walk.labels[n] if n in walk.labels else concrete(n.meta["val"])

    args, kwargs = map_arg(node.args, substitute), map_arg(node.kwargs, substitute)
    target = torch.ops.aten.reshape.default if node.target in VIEWS else node.target  # labels have strides of their own
    return target(*args, **kwargs)  # type: ignore[operator]


VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


def varying(labels: Tensor) -> Tensor:
    """Return the labels with every axis along which they do not change cut to size one."""
    for axis in (d for d in range(labels.dim()) if labels.shape[d] > 1):
        if labels.stride(axis) == 0 or bool((labels.narrow(axis, 0, 1) == labels).all()):
            labels = labels.narrow(axis, 0, 1)
    return labels


def channel_axes(labels: Tensor) -> list[int]:
    """Return the axes along which the channel changes."""
    return [d for d, size in enumerate(varying(labels).shape) if size > 1]


def last_axis(labels: Tensor) -> Tensor | None:
    """Return the ids along the last axis if no other axis changes them, and None otherwise."""
    if not labels.numel() or any(d != labels.dim() - 1 for d in channel_axes(labels)):
        return None
    return labels[(0,) * (labels.dim() - 1)].clone()


def trimmed(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return two label tensors of one shape with every axis along which neither changes cut to size one."""
    for axis in set(range(a.dim())) - set(channel_axes(a)) - set(channel_axes(b)):
        a, b = a.narrow(axis, 0, 1), b.narrow(axis, 0, 1)
    return a, b


def id_pairs(a: Tensor, b: Tensor) -> Tensor:
    """Return which ids of two label tensors of one shape meet, int64 [2, count]."""
    return torch.stack([a.reshape(-1), b.reshape(-1)])


def along_axis(values: Tensor, axis: int, dims: int) -> Tensor:
    """Return a vector as a tensor of `dims` axes that varies along one of them."""
    return values.reshape([-1 if d == axis else 1 for d in range(dims)])


def axis_index(labels: Tensor, axes: list[int]) -> Tensor:
    """Return for each element its index along some axes, taken as one flattened axis."""
    index = torch.zeros((), dtype=torch.int64)
    for axis in axes:
        index = index * labels.shape[axis] + along_axis(torch.arange(labels.shape[axis]), axis, labels.dim())
    return index.expand(labels.shape)
