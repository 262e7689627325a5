"""A stack of weights behind a grouped or a batched product is a linear for each expert, and a router sorts the rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from quantize.graph.labels import shape_of
from quantize.graph.linears import Linear
from quantize.graph.rules.table import name_of

GROUPED = {"_grouped_mm", "grouped_mm", "grouped_mm_fallback"}  # rows sorted by expert, weights [experts, K, N]
BATCHED = {"bmm", "matmul"}  # x [experts, rows, K], weights [experts, K, N]
PRODUCTS = {*GROUPED, *BATCHED, "linear", "addmm", "mm", "scaled_dot_product_attention", "convolution"}
CHOICES = {"topk", "sort", "argsort", "argmax"}
CASTS = {"to", "_to_copy", "contiguous", "clone", "alias", "detach"}


def grouped_mm(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """Multiply rows [S, K], sorted by expert up to row `offs` [experts] of each, with [experts, K, N]: [S, N]."""
    y, first = x.new_zeros(x.shape[0], weight.shape[2]), 0
    for expert, end in enumerate([] if isinstance(x, torch._subclasses.FakeTensor) or x.is_meta else offs.tolist()):
        y[first:end] = x[first:end] @ weight[expert]
        first = end
    return y


def find_experts(node: fx.Node, parameters: Mapping[fx.Node, str]) -> Linear | None:
    """Return the linears, one for each expert, that a product with a stack of weights computes; None for others."""
    kind = name_of(node) if node.op == "call_function" else ""
    if kind not in GROUPED | BATCHED or (found := stack_of(node.args[1], parameters)) is None:
        return None
    parameter, transposed = found
    x, sizes = node.args[0], tuple(parameter.meta["val"].shape)
    if not isinstance(x, fx.Node) or (kind in BATCHED and not same_experts(x, sizes[0])):
        return None
    offsets = operand(node, 2, "offs") if kind in GROUPED else None
    if kind in GROUPED and (offsets is None or operand(node, 3, "bias") is not None):
        return None
    name, columns = parameters[parameter], sizes[1 if transposed else 2]
    return Linear(name, node, x, name, None, columns, transposed, (node,), sizes[0], offsets)


def stack_of(weight: Any, parameters: Mapping[fx.Node, str]) -> tuple[fx.Node, bool] | None:
    """Return the stack that an operand [experts, K, N] is, and whether it is stored like that; else [experts, N, K]."""
    stored = True
    while isinstance(weight, fx.Node) and weight not in parameters:
        if name_of(weight) in {"transpose", "permute"} and exchanges_last(weight):
            stored = not stored
        elif name_of(weight) not in CASTS:
            return None
        weight = weight.args[0]
    if not isinstance(weight, fx.Node) or len(weight.meta["val"].shape) != 3:
        return None
    return weight, stored


def exchanges_last(node: fx.Node) -> bool:
    """Return whether a node exchanges the last two of three axes and nothing else."""
    axes: Any = node.args[1:] if name_of(node) == "transpose" else node.args[1]
    if len(shape_of(node)) != 3:
        return False
    places = [axis % 3 for axis in axes]
    return sorted(places) == [1, 2] if name_of(node) == "transpose" else places == [0, 2, 1]


def same_experts(x: fx.Node, experts: int) -> bool:
    """Return whether a value is [experts, rows, K]."""
    shape = x.meta["val"].shape
    return len(shape) == 3 and isinstance(shape[0], int) and shape[0] == experts


def operand(node: fx.Node, place: int, name: str) -> Any:
    """Return an operand by its place or its name; None if it is not given."""
    return node.args[place] if place < len(node.args) else node.kwargs.get(name)


def read_otherwise(linears: Iterable[Linear], parameters: Mapping[fx.Node, str]) -> set[str]:
    """Return stacks that something else than a product with all experts reads, which nothing can stand in for."""
    products: dict[str, set[fx.Node]] = {}
    for linear in (x for x in linears if x.experts is not None):
        products.setdefault(linear.weight, set()).add(linear.node)
    by_name = {name: node for node, name in parameters.items()}
    return {name for name, nodes in products.items() if len(nodes) > 1 or not consumers(by_name[name]) <= nodes}


def turned(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes that turn a stack around or cast it, one behind the other."""
    for user in node.users:
        if name_of(user) in CASTS or (name_of(user) in {"transpose", "permute"} and exchanges_last(user)):
            yield user
            yield from turned(user)


def consumers(node: fx.Node) -> set[fx.Node]:
    """Return the nodes that compute with a stack, behind those that turn it around or cast it."""
    between = set(turned(node))
    return {user for source in (node, *between) for user in source.users} - between


def token_index(linear: Linear) -> fx.Node | None:
    """Return the node that tells which token each input row of experts is, if the input is a gather of tokens."""
    source = linear.source
    while name_of(source) in CASTS:
        source = source.all_input_nodes[0]
    where: Any = source.args[1] if name_of(source) == "index" and linear.offsets is not None else ()
    return where[0] if len(where) == 1 else None


def routers(nodes: Iterable[fx.Node], linears: Mapping[fx.Node, Linear]) -> set[fx.Node]:
    """Return the linears among some nodes that choose experts: the last ones in front of a choice of the largest."""
    found, ahead = set[fx.Node](), [node for node in nodes if name_of(node) in CHOICES]
    seen = set(ahead)
    while ahead:
        for source in ahead.pop().all_input_nodes:
            if source in linears:
                found.add(source)
            elif source not in seen and source.op == "call_function" and name_of(source) not in PRODUCTS:
                seen.add(source)
                ahead.append(source)
    return found


def nodes_between(producer: Linear, follower: Linear) -> list[fx.Node] | None:
    """Return the nodes that make the input of experts of the output of other experts, in order, row by row.

    Returns:
        None if they read anything else that depends on the row but biases (`gathered_bias`).
    """
    behind, between = {producer.node}, list[fx.Node]()
    node = producer.node
    while node is not follower.node:
        node = node.next
        if behind & {*node.all_input_nodes}:
            behind.add(node)
            between.append(node)
    needed, ahead = set[fx.Node](), [follower.source]
    while ahead:
        if (node := ahead.pop()) in behind and node not in needed:
            needed.add(node)
            ahead += node.all_input_nodes
    others = {source for node in needed - {producer.node} for source in node.all_input_nodes} - needed
    if producer.node not in needed or not all(gathered_bias(other) for other in others):
        return None
    return [node for node in between if node in needed]


def gathered_bias(node: fx.Node) -> bool:
    """Return whether a value holds for each row the bias of its expert: a row of a placeholder, taken by a number."""
    source = node.args[0] if node.op == "call_function" and name_of(node) == "index" else None
    return isinstance(source, fx.Node) and source.op == "placeholder" and len(node.args[1]) == 1  # type: ignore[arg-type]


def expert_rows(offs: Tensor) -> list[tuple[int, slice]]:
    """Return each expert that has rows with its rows, which end at `offs` [experts]."""
    ends = [0, *map(int, offs.cpu().tolist())]
    return [(e, slice(*ends[e : e + 2])) for e in range(len(ends) - 1) if ends[e] < ends[e + 1]]
