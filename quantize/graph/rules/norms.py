"""Norms: the mean square admits rotations, subtracting the mean admits those that keep the mean, and gains scale."""

from __future__ import annotations

from torch import Tensor, fx

from quantize.graph.allowed_transforms import AllowedTransforms
from quantize.graph.labels import ChannelTrace, axis_index, channel_axes
from quantize.graph.rules.table import SOURCES, arguments, name_of, pin_all, rule
from quantize.graph.rules.weights import gain


@rule("pow", "square")
def squared(walk: ChannelTrace, node: fx.Node) -> None:
    """A square is noted, since its mean over the channels admits rotations; any other use of it admits nothing."""
    if arguments(node)[0] not in walk.labels or (name_of(node) == "pow" and arguments(node)[1] != 2):
        return pin_all(walk, node, f"`{name_of(node)}` acts on each channel")
    walk.squares[node] = walk.labels[arguments(node)[0]]


@rule("mean", "sum")
def averaged(walk: ChannelTrace, node: fx.Node) -> None:
    """A mean over tokens treats each channel alike; a mean square over channels is invariant under rotations."""
    x, labels = arguments(node)[0], walk.labels.get(arguments(node)[0])
    reduced = reduced_axes(node, walk)
    if labels is not None and not set(reduced) & set(channel_axes(labels)):
        walk.labels[node] = without(labels, reduced, keepdim(node))
    elif labels is not None and name_of(node) == "mean" and keepdim(node):
        walk.means[node] = labels
    elif x in walk.squares and set(reduced) & set(channel_axes(walk.squares[x])):
        mean_square(walk, walk.squares[x], reduced)
    else:
        pin_all(walk, node, f"`{name_of(node)}` is taken over its channels")


def reduced_axes(node: fx.Node, walk: ChannelTrace) -> list[int]:
    """Return the axes that a reduction sums over."""
    x = arguments(node)[0]
    dims = next(t[x] for t in (walk.labels, walk.squares, walk.means) if x in t).dim()
    axes = arguments(node)[1] if len(arguments(node)) > 1 else None
    return [axis % dims for axis in ([axes] if isinstance(axes, int) else axes or range(dims))]


def keepdim(node: fx.Node) -> bool:
    """Return whether a reduction leaves axes of size one."""
    return bool(arguments(node)[2]) if len(arguments(node)) > 2 else bool(node.kwargs.get("keepdim"))


def without(labels: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Return labels without some axes, along which they do not change."""
    for axis in sorted(axes, reverse=True):
        labels = labels.narrow(axis, 0, 1) if keep else labels.select(axis, 0)
    return labels


@rule("var", "std", "linalg_vector_norm", "norm")
def deviation(walk: ChannelTrace, node: fx.Node) -> None:
    """The variance over the channels admits rotations that keep the mean, and their length admits all rotations."""
    x, second, *rest = arguments(node)
    labels, is_norm = walk.labels.get(x), "norm" in name_of(node)
    axes = rest[0] if is_norm and rest else second
    if labels is None or not isinstance(axes, list) or (is_norm and second != 2) or "correction" in node.kwargs:
        return pin_all(walk, node, f"`{name_of(node)}` is taken over its channels")
    allowed = AllowedTransforms.ORTHOGONAL if is_norm else AllowedTransforms.CENTRED_ORTHOGONAL
    mean_square(walk, labels, [a % labels.dim() for a in axes], allowed)


@rule("rms_norm", kind=SOURCES)
def rms_norm(walk: ChannelTrace, node: fx.Node) -> None:
    """RMSNorm as one operator takes the mean square and multiplies by the gain."""
    normalize(walk, node, AllowedTransforms.ORTHOGONAL)


@rule("layer_norm", kind=SOURCES)
def layer_norm(walk: ChannelTrace, node: fx.Node) -> None:
    """LayerNorm admits rotations that keep the mean over the channels; its bias writes the channels behind its gain."""
    normalize(walk, node, AllowedTransforms.CENTRED_ORTHOGONAL)
    bias = arguments(node)[3] if len(arguments(node)) > 3 else None
    if bias is None or node not in walk.labels:
        return
    if (view := walk.view(bias)) is None:
        walk.restrict(walk.labels[node], AllowedTransforms.NONE, "the bias of a norm is no parameter")
    else:
        walk.use(node, view, -1, walk.merge_equal(walk.labels[node]))


def normalize(walk: ChannelTrace, node: fx.Node, allowed: AllowedTransforms) -> None:
    """Treat a norm over the last axis and its gain."""
    x, size, *rest = arguments(node)
    labels, parameter = walk.labels.get(x), rest[0] if rest else None
    view = walk.view(parameter)
    if len(size) != 1 or (parameter is not None and view is None):
        return pin_all(walk, node, f"`{name_of(node)}` normalizes several axes, or with a gain that is no parameter")
    walk.pin_derived(x, "its square or mean is normalized")
    if labels is not None:
        mean_square(walk, labels, [labels.dim() - 1], allowed)
        walk.labels[node] = labels
    if view is not None:
        gain(walk, node, labels, view)


def mean_square(
    walk: ChannelTrace, labels: Tensor, reduced: list[int], allowed: AllowedTransforms = AllowedTransforms.ORTHOGONAL
) -> None:
    """Restrict channels that are averaged together along the reduced axes, separately for each index of the others."""
    apart = [d for d in channel_axes(labels) if d not in reduced]
    walk.restrict(labels, allowed, REASONS[allowed], axis_index(labels, apart) if apart else None, counted=True)


REASONS = {
    AllowedTransforms.ORTHOGONAL: "its root mean square is taken, which only rotations keep",
    AllowedTransforms.CENTRED_ORTHOGONAL: (
        "its mean and variance are taken, which only rotations that keep the mean keep"
    ),
}
