"""Norms: the mean square keeps rotations, a mean keeps nothing; gains scale."""

from __future__ import annotations

from torch import Tensor, fx

from quantize.graph.group import Group
from quantize.graph.labels import Event, Walk, axis_index, channel_axes
from quantize.graph.rules.table import arguments, name_of, pin_all, rule
from quantize.graph.rules.weights import gain


@rule("pow", "square")
def squared(walk: Walk, node: fx.Node) -> None:
    """The square: only its mean over the channels keeps a symmetry, the orthogonal group."""
    if arguments(node)[0] not in walk.labels or (name_of(node) == "pow" and arguments(node)[1] != 2):
        return pin_all(walk, node, f"`{name_of(node)}` acts on each channel")
    walk.squares[node] = walk.labels[arguments(node)[0]]


@rule("mean", "sum")
def averaged(walk: Walk, node: fx.Node) -> None:
    """The mean square over the channels is invariant under rotations of the channels averaged together."""
    x, axes = arguments(node)[0], arguments(node)[1] if len(arguments(node)) > 1 else None
    labels = walk.squares.get(x)
    if labels is None or axes not in ([-1], [labels.dim() - 1]):
        return pin_all(walk, node, f"`{name_of(node)}` is taken over its channels")
    mean_square(walk, labels)


@rule("rms_norm")
def rms_norm(walk: Walk, node: fx.Node) -> None:
    """RMSNorm as one operator: the mean square and the gain."""
    x, _, *rest = arguments(node)
    if (labels := walk.labels.get(x)) is None:
        return pin_all(walk, node, "its square is normalized")
    mean_square(walk, labels)
    name = walk.parameter(rest[0]) if rest else None
    walk.labels[node] = labels
    if name is not None:
        gain(walk, node, x, name)


@rule("layer_norm")
def layer_norm(walk: Walk, node: fx.Node) -> None:
    """LayerNorm pins what it normalizes (it subtracts the mean over the channels); its gain and bias write anew."""
    x, _, *rest = arguments(node)
    walk.pin(x, "a LayerNorm subtracts the mean over its channels")
    names = [walk.parameter(p) for p in rest[:2]]
    if names and names[0]:
        written = walk.fresh(node)
        reason = f"it is written by the gain `{names[0]}`, which can only scale"
        walk.events.append(Event(written, Group.DIAGONAL, reason, parameter=names[0], vector=True))
        walk.events += [Event(written, parameter=name) for name in names[1:] if name]


def rms_blocks(labels: Tensor) -> Tensor | None:
    """Blocks that are averaged apart, where channels lie along other axes as well."""
    others = [d for d in channel_axes(labels) if d != labels.dim() - 1]
    return axis_index(labels, others[0]) if others else None


def mean_square(walk: Walk, labels: Tensor) -> None:
    """The channels of each block are averaged together."""
    reason = "its root mean square is taken, which only rotations keep"
    walk.restrict(labels, Group.ORTHOGONAL, reason, rms_blocks(labels))
