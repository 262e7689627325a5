"""In products with parameters and in tables, parameters read channels and write new ones."""

from __future__ import annotations

from torch import Tensor, fx

from quantize.graph.allowed_transforms import AllowedTransforms
from quantize.graph.labels import ChannelTrace, shape_of
from quantize.graph.rules.movement import as_value, origin
from quantize.graph.rules.table import SOURCES, arguments, name_of, pin_all, rule
from quantize.graph.views import View


@rule("linear", kind=SOURCES)
def linear(walk: ChannelTrace, node: fx.Node) -> None:
    """In a linear y = x Wᵀ + b, W reads the channels of x with its columns and writes new ones with its rows."""
    x, weight, *bias = arguments(node)
    multiply(walk, node, x, walk.view(weight), (-1, 0), *bias)


@rule("addmm", operands=2, kind=SOURCES)
def addmm(walk: ChannelTrace, node: fx.Node) -> None:
    """The operator is a linear y = b + x W whose weight is stored as [in, out]."""
    bias, x, weight = arguments(node)
    scaled = set(node.kwargs) & {"alpha", "beta"}
    multiply(walk, node, x, None if scaled else walk.view(weight), (0, 1), bias)


@rule("_grouped_mm", "grouped_mm", "grouped_mm_fallback", kind=SOURCES)
def grouped(walk: ChannelTrace, node: fx.Node) -> None:
    """Experts are a batch of linears: rows of x, sorted by expert, times W [experts, in, out]."""
    x, weight, *_ = arguments(node)
    multiply(walk, node, x, walk.view(weight), (-2, -1))


def multiply(
    walk: ChannelTrace,
    node: fx.Node,
    x: fx.Node,
    weight: View | None,
    axes: tuple[int, int],
    bias: fx.Node | None = None,
) -> None:
    """Treat a product over the channels of x with `axes` (in, out) of a weight, and a bias that is added."""
    region = weight.region() if weight else None
    if weight is None or region is None or weight.offset:
        return pin_all(walk, node, "it is multiplied with a matrix that is no parameter")
    walk.use(node, weight, axes[0], read_channels(walk, x), reads=True)
    written = walk.fresh(node)
    walk.use(node, weight, axes[1], written)
    if (found := walk.view(bias)) is not None:
        walk.use(node, found, -1, written)
    elif bias is not None:
        walk.pin(bias, "it is added as a bias")
        walk.restrict(written, AllowedTransforms.NONE, "its bias is no parameter")


def read_channels(walk: ChannelTrace, x: fx.Node) -> Tensor:
    """Return the channels in front of a linear; an input that no weight writes gets new channels that are pinned."""
    walk.pin_derived(x, "its square or mean is read by a weight")
    if as_value(walk, x) is None:
        walk.restrict(walk.fresh(x), AllowedTransforms.NONE, f"no weight writes it: it is {origin(x)}")
    return walk.merge_equal(walk.labels[x])


@rule("embedding", kind=SOURCES)
def embedding(walk: ChannelTrace, node: fx.Node) -> None:
    """A table writes new channels with its columns."""
    if table := walk.view(arguments(node)[0]):
        walk.use(node, table, -1, walk.fresh(node))


@rule("conv1d", "conv2d", "conv3d", "convolution", kind=SOURCES)
def convolution(walk: ChannelTrace, node: fx.Node) -> None:
    """A convolution reads channels along axis 1 and writes new ones, at each place the same."""
    x, weight, bias = (*arguments(node), None)[:3]
    view = walk.view(weight)
    if view is None or view.size[1] != shape_of(x)[1]:
        return pin_all(walk, node, f"`{name_of(node)}` reads its channels in groups")
    walk.pin_derived(x, "its square or mean is read by a weight")
    if x in walk.labels:
        walk.use(node, view, 1, walk.merge_equal(walk.labels[x], 1), reads=True)
    written = walk.fresh(node, axis=1)
    for parameter in (p for p in (view, walk.view(bias)) if p):
        walk.use(node, parameter, 0, written)


def gain(walk: ChannelTrace, node: fx.Node, labels: Tensor | None, view: View) -> None:
    """Treat a parameter vector that scales a value: it reads the channels, if any, and writes others unless folded."""
    if labels is not None and view.name in walk.folded:
        walk.labels[node] = labels.expand(shape_of(node))
        return
    if labels is not None:
        walk.use(
            node, view, -1, walk.merge_equal(labels), reads=True, gain=f"the gain `{view.name}` scales its channels"
        )
    walk.use(node, view, -1, walk.fresh(node), gain=f"the gain `{view.name}` sits between it and what writes it")
