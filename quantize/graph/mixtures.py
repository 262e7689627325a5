"""A mixture is the stacks of experts of one layer, whose outputs are weighted and added up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from quantize.graph.experts import CASTS, PRODUCTS
from quantize.graph.labels import shape_of
from quantize.graph.linears import VIEWS, Linear
from quantize.graph.program import Program, Segment
from quantize.graph.rules.table import name_of

ROW_BY_ROW = {"add", "add_", "mul", "mul_", "div", "div_", "masked_fill", "masked_fill_", "where", *CASTS}


@dataclass(frozen=True)
class Mixture:
    """The experts of one layer.

    Attributes:
        path: the path of the module that owns the last stack.
        count: E, the number of experts.
        groups: the number of groups of neighbouring experts from which the router chooses some first; 1 for none.
        stacks: the stacks of their weights, in order.
        outputs: the node of what is added up over experts: the output of each expert for each of its rows, biases and
            the router's weight included, [S, N] or [E, S, N].
    """

    path: str
    count: int
    groups: int
    stacks: tuple[Linear, ...]
    outputs: fx.Node


def find_mixtures(program: Program, segment: Segment) -> list[Mixture]:
    """Return the mixtures of a segment, in order."""
    found: dict[tuple[fx.Node | None, int], list[Linear]] = {}
    for linear in program.linears(segment):
        if linear.experts is not None:
            found.setdefault((linear.offsets, linear.experts), []).append(linear)
    return [make_mixture(count, stacks, set(segment.nodes)) for (_, count), stacks in found.items()]


def make_mixture(count: int, stacks: list[Linear], inside: set[fx.Node]) -> Mixture:
    """Return the mixture of some stacks; `inside` are the nodes of its segment."""
    last = stacks[-1]
    outputs = last.node
    while len(outputs.users) == 1 and keeps_rows(outputs, user := next(iter(outputs.users))):
        outputs = user
    groups = max(groups_above(last.offsets or stacks[0].source, count, inside), default=1)
    return Mixture(last.path.rpartition(".")[0], count, groups, tuple(stacks), outputs)


def keeps_rows(node: fx.Node, user: fx.Node) -> bool:
    """Return whether a node computes with rows [..., N], row by row, and has as many."""
    return name_of(user) in ROW_BY_ROW and shape_of(user) == shape_of(node)


def groups_above(node: fx.Node, count: int, inside: set[fx.Node]) -> Iterator[int]:
    """Yield the numbers of groups into which the scores of experts [..., E] are viewed, behind the router's linear."""
    seen, ahead = {node}, [node]
    while ahead:
        node = ahead.pop()
        if node.target in VIEWS and shape_of(node.all_input_nodes[0])[-1:] == (count,):
            *_, a, b = (1, *shape_of(node))
            if a * b == count:
                yield a
        if name_of(node) not in PRODUCTS:
            ahead += [n for n in node.all_input_nodes if n in inside and n not in seen]
            seen |= {*node.all_input_nodes}
