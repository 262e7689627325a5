"""Linears are products with a parameter; a quantized linear may stand in for the module that computes one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from quantize.graph.labels import shape_of

ATEN = torch.ops.aten
LINEAR = ATEN.linear.default
VIEWS = {  # other shapes of the same elements in the same order
    ATEN.view.default,
    ATEN.reshape.default,
    ATEN._unsafe_view.default,
    ATEN.flatten.using_ints,
    ATEN.unflatten.int,
    ATEN.contiguous.default,
}
NOT_ALONE = "its module computes more than this product"
STACK = "a stack of matrices that is no operand of a product of experts"
STACK_READ = "the model reads this stack of matrices in other ways than by the products of its experts"
READ_ITSELF = "the model reads it itself, not through its module"
MORE_VALUES = "its module takes or returns more than one tensor"


class Form(NamedTuple):
    """The places of a product's operands, and whether the product takes the weight as [K, N]."""

    source: int
    weight: int
    bias: int | None
    transposed: bool


FORMS: dict[Any, Form] = {
    LINEAR: Form(0, 1, 2, False),
    ATEN.addmm.default: Form(1, 2, 0, True),
    ATEN.mm.default: Form(0, 1, None, True),
    ATEN.matmul.default: Form(0, 1, None, True),
}


@dataclass(frozen=True)
class Linear:
    """A linear whose weight is a parameter; or the linears of all experts, whose weights are one parameter.

    The weight of experts is taken as one matrix [experts · N, K], with the rows of one expert after the other.

    Attributes:
        path: the path of the module that owns the weight; that of the parameter, for experts.
        node, source: the node of the product, and the node of its input [..., K]; of the first of several calls.
        calls: the nodes of the products of all calls, in order.
        weight, bias: the names of its parameters.
        columns: K, the number of input channels.
        transposed: whether the weight is stored as [K, N], or that of experts as [experts, K, N].
        experts: the number of experts; None for a linear alone.
        offsets: the node that tells behind which row of the input [S, K] the rows of each expert end; None for a linear
            alone, and for experts whose input is [experts, S, K].
    """

    path: str
    node: fx.Node
    source: fx.Node
    weight: str
    bias: str | None
    columns: int
    transposed: bool
    calls: tuple[fx.Node, ...]
    experts: int | None = None
    offsets: fx.Node | None = None

    @property
    def sources(self) -> tuple[fx.Node, ...]:
        """The inputs of all calls."""
        return (self.source,) if self.experts is not None else tuple(input_of(node) for node in self.calls)

    def as_out_in(self, weight: Tensor) -> Tensor:
        """Turn the weight from how it is stored to [N, K], that of experts to [experts · N, K], or back."""
        if self.experts is None:
            return weight.T if self.transposed else weight
        if weight.dim() == 2:
            stack: Tensor = weight.unflatten(0, (self.experts, -1))
            return stack.mT if self.transposed else stack
        return (weight.mT if self.transposed else weight).flatten(0, 1)

    @property
    def operands(self) -> tuple[fx.Node, ...]:
        """The nodes that a quantized linear in its place is given: the input, and for experts where their rows end."""
        return (self.source,) if self.offsets is None else (self.source, self.offsets)


def by_input(linears: Iterable[Linear]) -> list[list[Linear]]:
    """Return lists of linears that share the inputs of all their calls, in the order of the first of each."""
    sharing: dict[tuple[fx.Node, ...], list[Linear]] = {}
    for linear in linears:
        sharing.setdefault(linear.sources, []).append(linear)
    return list(sharing.values())


def by_weight(linears: Iterable[Linear]) -> list[Linear]:
    """Return one linear for each weight, with all its calls, in the order of the first of each."""
    calls: dict[str, list[Linear]] = {}
    for linear in linears:
        calls.setdefault(linear.weight, []).append(linear)
    return [replace(found[0], calls=tuple(node for call in found for node in call.calls)) for found in calls.values()]


def input_of(node: fx.Node) -> fx.Node:
    """Return the input of a product."""
    return node.args[FORMS[node.target].source]  # type: ignore[return-value]


def find_linear(node: fx.Node, parameters: Mapping[fx.Node, str]) -> Linear | None:
    """Return the linear x Wᵀ + b or x W + b that a node computes, W and b [N] (or no b) parameters; None for others."""
    form = FORMS.get(node.target)
    if form is None or any(factor != 1 for factor in node.kwargs.values()):  # alpha, beta
        return None
    weight, bias = operand(node, form.weight), operand(node, form.bias)
    size = parameter_size(weight, parameters)
    if len(size) != 2:
        return None
    rows, columns = reversed(size) if form.transposed else size
    if bias is not None and parameter_size(bias, parameters) != (rows,):
        return None
    name, bias_name = parameters[weight], None if bias is None else parameters[bias]
    return Linear(name.rpartition(".")[0], node, input_of(node), name, bias_name, columns, form.transposed, (node,))


def operand(node: fx.Node, place: int | None) -> Any:
    """Return an operand of a product; None if it has none there."""
    return node.args[place] if place is not None and place < len(node.args) else None


def parameter_size(node: Any, parameters: Mapping[fx.Node, str]) -> tuple[int, ...]:
    """Return the shape of a parameter; () for anything else."""
    return tuple(node.meta["val"].shape) if isinstance(node, fx.Node) and node in parameters else ()


def not_replaceable(graph: fx.Graph, linears: Iterable[Linear], parameters: Mapping[fx.Node, str]) -> set[str]:
    """Return weights of linears whose module computes something else, too, so that nothing can stand in for it."""
    by_name, inside = {name: node for node, name in parameters.items()}, nodes_inside(graph)
    calls: dict[str, list[Linear]] = defaultdict(list)  # a module may be called several times
    for linear in linears:
        calls[linear.weight].append(linear)
    return {
        weight
        for weight, found in calls.items()
        if modules_of(found[0].node) and not stands_alone(found, inside[found[0].path], by_name)
    }


def stacks(parameters: Mapping[fx.Node, str]) -> set[str]:
    """Return parameters of three and more axes."""
    return {name for node, name in parameters.items() if sum(n > 1 for n in node.meta["val"].shape) > 2}


def nodes_inside(graph: fx.Graph) -> dict[str, set[fx.Node]]:
    """Map module paths to the nodes that the module or a module in it computes; sizes are left out."""
    inside: dict[str, set[fx.Node]] = defaultdict(set)
    for node in graph.nodes:
        for path in () if isinstance(node.meta.get("val"), int | torch.SymInt) else modules_of(node):
            inside[path].add(node)
    return inside


def modules_of(node: fx.Node) -> list[str]:
    """Return the paths of the modules that a node lies in, from outermost to innermost; [] if none is known."""
    return [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def stands_alone(calls: list[Linear], inside: Collection[fx.Node], by_name: Mapping[str, fx.Node]) -> bool:
    """Return whether a module computes one product a call, on rows as they come, with parameters of its own."""
    chains = [chain(linear, inside) for linear in calls]
    computed = {node for nodes in chains for node in nodes}
    owned = {by_name[name] for name in (calls[0].weight, calls[0].bias) if name is not None}
    below = {node for name, node in by_name.items() if name.startswith(f"{calls[0].path}.")}
    used = {user for node in owned for user in node.users}
    return computed == set(inside) and used <= computed and below == owned and all(map(keeps_rows, chains))


def chain(linear: Linear, inside: Collection[fx.Node]) -> list[fx.Node]:
    """Return a product with the views in front of and behind it that lie inside and that nothing else reads."""
    nodes = [linear.node]
    while (before := first_input(nodes[0])) in inside and before.target in VIEWS and len(before.users) == 1:
        nodes.insert(0, before)
    while len(nodes[-1].users) == 1 and (after := next(iter(nodes[-1].users))) in inside and after.target in VIEWS:
        nodes.append(after)
    return nodes


def first_input(node: fx.Node) -> fx.Node:
    """Return the input of a product or view."""
    return input_of(node) if node.target in FORMS else node.args[0]  # type: ignore[return-value]


def keeps_rows(nodes: list[fx.Node]) -> bool:
    """Return whether a chain turns [..., K] into [..., N]."""
    return shape_of(first_input(nodes[0]))[:-1] == shape_of(nodes[-1])[:-1]
