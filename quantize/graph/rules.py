"""What each operator does to the channels of its inputs: one table. An operator without a rule pins them.

Three kinds of statement: channels stay the same, channels meet (are added, or scale one another), a parameter writes or
reads them. Everything is about example-sized label tensors (`labels.py`); no rule knows a module or a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from quantize.graph.group import Group
from quantize.graph.labels import Event, Walk, channel_axes, last_axis, move, shape_of

Rule = Callable[[Walk, fx.Node], None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators by name, all overloads."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def name_of(node: fx.Node) -> str:
    """`linear` for `aten.linear.default`."""
    target: Any = node.target
    return str(getattr(target, "overloadpacket", getattr(target, "__name__", target))).rsplit(".", 1)[-1]


def arguments(node: fx.Node) -> Any:
    """Positional arguments of an operator, whose types its schema knows and the type checker does not."""
    return node.args


def visit(walk: Walk, node: fx.Node) -> None:
    """Apply the rule of a node that touches channels; one without a rule pins all it touches."""
    touched = [n for n in node.all_input_nodes if n in walk.labels or n in walk.squares]
    apply = RULES.get(name_of(node))
    if apply is not None and (touched or apply in SOURCES):
        apply(walk, node)
    elif touched:
        for source in touched:
            walk.pin(source, f"`{name_of(node)}` has no rule")
    labels = walk.labels.get(node)
    if isinstance(labels, Tensor) and labels.dim() and (ids := last_axis(labels)) is not None:
        walk.at[node] = ids


@rule(
    "view",
    "_unsafe_view",
    "reshape",
    "transpose",
    "permute",
    "t",
    "unsqueeze",
    "squeeze",
    "expand",
    "slice",
    "select",
    "split",
    "split_with_sizes",
    "chunk",
    "unbind",
    "stack",
    "contiguous",
    "clone",
    "alias",
    "detach",
    "repeat",
    "repeat_interleave",
    "narrow",
    "flatten",
    "unflatten",
    "movedim",
    "getitem",
)
def moved(walk: Walk, node: fx.Node) -> None:
    """Data movement: channels go where their elements go."""
    if any(n in walk.squares for n in node.all_input_nodes):
        return walk.pin(node.all_input_nodes[0], f"its square passes through `{name_of(node)}`")
    walk.labels[node] = move(walk, node)


@rule("cat")
def concatenated(walk: Walk, node: fx.Node) -> None:
    """Data movement if every part has channels; parts that no weight writes cannot absorb anything."""
    if all(n in walk.labels for n in node.all_input_nodes):
        return moved(walk, node)
    for source in node.all_input_nodes:
        walk.pin(source, "it is joined (`cat`) with values that no weight writes")


@rule("dropout", "to", "_to_copy", "type_as", "float", "neg", "dropout_")
def same(walk: Walk, node: fx.Node) -> None:
    """Casts, signs and inactive dropout: the same channels, up to one common factor."""
    source = node.all_input_nodes[0]
    for table in (walk.labels, walk.squares):
        if source in table:
            table[node] = table[source]


@rule("linear")
def linear(walk: Walk, node: fx.Node) -> None:
    """Y = x Wᵀ + b: W reads the channels of x with its columns and writes new ones with its rows."""
    x, weight, *rest = arguments(node)
    name = walk.parameter(weight)
    if name is None:
        return pin_all(walk, node, "it is multiplied with a matrix that is no parameter")
    ids = read_channels(walk, x)
    if ids is not None:
        walk.events.append(Event(ids, parameter=name, axis=1, reads=True))
    written = walk.fresh(node)
    walk.events.append(Event(written, parameter=name, axis=0))
    if rest and (bias := walk.parameter(rest[0])):
        walk.events.append(Event(written, parameter=bias, axis=0))


def read_channels(walk: Walk, x: fx.Node) -> Tensor | None:
    """The channels in front of a linear; an input that no weight writes is given channels pinned from birth."""
    if x in walk.squares:
        walk.pin(x, "its square is read by a weight")
    elif x not in walk.labels:
        walk.restrict(walk.fresh(x), Group.NONE, f"no weight writes it: it is {origin(x)}")
    if x not in walk.labels:
        return None
    if (ids := last_axis(walk.labels[x])) is None:
        walk.pin(x, "a weight reads other channels of it at other positions")
    return ids


def source_of(node: fx.Node) -> fx.Node:
    """The operator that computed a value, behind any data movement."""
    while RULES.get(name_of(node)) in (moved, same) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def origin(node: fx.Node) -> str:
    """A value in words, by the operator and the module that computed it."""
    source = source_of(node)
    stack = source.meta.get("nn_module_stack") or {"": ("the model",)}
    return f"the output of `{name_of(source)}` in `{list(stack.values())[-1][0]}`"


@rule("embedding")
def embedding(walk: Walk, node: fx.Node) -> None:
    """A table writes new channels with its columns."""
    if name := walk.parameter(arguments(node)[0]):
        walk.events.append(Event(walk.fresh(node), parameter=name, axis=1))


SOURCES = {linear, embedding}  # they make channels even where no input has any


@rule("add", "add_", "sub")
def added(walk: Walk, node: fx.Node) -> None:
    """Residual sums make two channels one; a parameter added writes; anything else that is added pins."""
    x, y = arguments(node)[:2]
    known = [n for n in (x, y) if n in walk.labels]
    if any(n in walk.squares for n in (x, y)):
        return pin_all(walk, node, "its square is added to something")
    if len(known) == 2:
        return join(walk, node, walk.labels[x], walk.labels[y])
    other = y if known[0] is x else x
    labels, name = walk.labels[known[0]], walk.parameter(other)
    ids = last_axis(labels)
    if name is None or ids is None or shape_of(other)[-1] != len(ids):
        return walk.pin(known[0], "something that no weight writes is added to it")
    walk.events.append(Event(ids, parameter=name, axis=len(shape_of(other)) - 1))
    walk.labels[node] = labels.expand(shape_of(node))


def join(walk: Walk, node: fx.Node, a: Tensor, b: Tensor) -> None:
    """The channels of two summands are the same channels."""
    a, b = torch.broadcast_tensors(a, b)
    walk.joined.append(torch.stack([a.reshape(-1), b.reshape(-1)]).unique(dim=1))
    walk.labels[node] = a


@rule("mul", "mul_", "div")
def scaled(walk: Walk, node: fx.Node) -> None:
    """A number or a factor for each token changes nothing; a factor for each channel commutes with diagonals only."""
    x, y = arguments(node)[:2]
    if x is y and x in walk.labels and name_of(node) == "mul":
        return squared(walk, node)
    if any(n in walk.squares for n in (x, y)):
        return pin_all(walk, node, "its square is scaled")
    if y in walk.labels and (x in walk.labels or name_of(node) == "div"):
        walk.pin(x if x in walk.labels else y, f"`{name_of(node)}` combines it with other channels")
        if name_of(node) == "div":
            return walk.pin(y, "something is divided by it")
    known, other = (y, x) if y in walk.labels else (x, y)
    scale(walk, node, known, other)


def scale(walk: Walk, node: fx.Node, known: fx.Node, other: Any) -> None:
    """`known` has channels and `other` multiplies it."""
    labels = walk.labels[known]
    if not isinstance(other, fx.Node) or not hasattr(other.meta["val"], "shape"):
        walk.labels[node] = labels
    elif (name := walk.parameter(other)) and shape_of(other) == labels.shape[-1:]:
        gain(walk, node, known, name)
    else:
        factor(walk, node, labels, other)


def gain(walk: Walk, node: fx.Node, known: fx.Node, name: str) -> None:
    """A parameter vector scales the channels: it reads them and writes new ones, unless it was folded to ones."""
    if name in walk.folded:
        walk.labels[node] = walk.labels[known]
    elif (ids := last_axis(walk.labels[known])) is None:
        walk.pin(known, f"the gain `{name}` scales more than one axis of it")
    else:
        reason = f"the gain `{name}` scales its channels one by one"
        walk.events.append(Event(ids, Group.DIAGONAL, reason, parameter=name, reads=True, vector=True))
        reason = f"it is written by the gain `{name}`, which can only scale"
        walk.events.append(Event(walk.fresh(node), Group.DIAGONAL, reason, parameter=name, vector=True))


def factor(walk: Walk, node: fx.Node, labels: Tensor, other: fx.Node) -> None:
    """A computed factor: harmless where it is one number for all channels of a block."""
    labels = labels.expand(shape_of(node))
    size = (1,) * (labels.dim() - len(shape_of(other))) + shape_of(other)
    varying = [d for d in channel_axes(labels) if size[d] != 1]
    if varying == [1] and labels.dim() == 4:
        walk.restrict(labels, Group.LINEAR, "", blocks=axis_index(labels, 1))
    elif varying:
        walk.restrict(labels, Group.DIAGONAL, f"{origin(other)} scales its channels one by one")
    walk.labels[node] = labels


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
    walk.restrict(
        labels, Group.ORTHOGONAL, "its root mean square is taken, which only rotations keep", rms_blocks(labels)
    )


def rms_blocks(labels: Tensor) -> Tensor | None:
    """Blocks that are averaged apart, where channels lie along other axes as well."""
    others = [d for d in channel_axes(labels) if d != labels.dim() - 1]
    return axis_index(labels, others[0]) if others else None


def axis_index(labels: Tensor, axis: int) -> Tensor:
    """For each element its index along an axis."""
    shape = [-1 if d == axis else 1 for d in range(labels.dim())]
    return torch.arange(labels.shape[axis]).reshape(shape).expand(labels.shape)


@rule("rms_norm")
def rms_norm(walk: Walk, node: fx.Node) -> None:
    """RMSNorm as one operator: the mean square and the gain."""
    x, _, *rest = arguments(node)
    if (labels := walk.labels.get(x)) is None:
        return pin_all(walk, node, "its square is normalized")
    walk.restrict(
        labels, Group.ORTHOGONAL, "its root mean square is taken, which only rotations keep", rms_blocks(labels)
    )
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


@rule("relu", "relu_")
def relu(walk: Walk, node: fx.Node) -> None:
    """max(x, 0) commutes with positive factors."""
    labels = walk.labels[arguments(node)[0]]
    walk.restrict(labels, Group.POSITIVE_DIAGONAL, "`relu` commutes with positive factors only")
    walk.labels[node] = labels


@rule(
    "silu",
    "gelu",
    "tanh",
    "sigmoid",
    "exp",
    "softmax",
    "_softmax",
    "softplus",
    "erf",
    "hardtanh",
    "clamp",
    "abs",
    "log",
    "rsqrt",
    "sqrt",
)
def nonlinear(walk: Walk, node: fx.Node) -> None:
    """A nonlinear function of each channel ends every symmetry."""
    pin_all(walk, node, f"the nonlinearity `{name_of(node)}` acts on each channel")


def pin_all(walk: Walk, node: fx.Node, reason: str) -> None:
    """Pin every basis that a node touches."""
    for source in node.all_input_nodes:
        walk.pin(source, reason)


@rule("scaled_dot_product_attention")
def attention(walk: Walk, node: fx.Node) -> None:
    """softmax(q kᵀ) v: the scores pin queries and keys; each head averages its value channels over the tokens."""
    q, k, v = arguments(node)[:3]
    for source in (q, k):
        walk.pin(source, "attention scores multiply queries with keys")
    if v in walk.labels:
        mix_tokens(walk, node, v, walk.labels[v])


@rule("matmul", "bmm")
def product(walk: Walk, node: fx.Node) -> None:
    """A product of two computed values mixes tokens of the right one if that lies with channels last."""
    a, b = arguments(node)
    if a in walk.labels or a in walk.squares or b not in walk.labels:
        return pin_all(walk, node, f"`{name_of(node)}` multiplies it with another value")
    mix_tokens(walk, node, b, walk.labels[b])


def mix_tokens(walk: Walk, node: fx.Node, source: fx.Node, labels: Tensor) -> None:
    """Sums over axis -2 with weights of their own for each index of the axes before: heads must not mix."""
    if bool((labels != labels.narrow(-2, 0, 1)).any()):
        return walk.pin(source, f"`{name_of(node)}` sums over its channels")
    heads = [d for d in channel_axes(labels) if d < labels.dim() - 2]
    if heads:
        walk.restrict(labels, Group.LINEAR, "", blocks=axis_index(labels, heads[0]))
    shape, row = shape_of(node), labels.narrow(-2, 0, 1)
    for d in heads:  # grouped queries: each key/value head serves a run of query heads
        row = row.repeat_interleave(shape[d] // row.shape[d], dim=d)
    walk.labels[node] = row.expand(shape)
