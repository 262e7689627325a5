"""A stack of experts that files hold as one tensor is written as a linear for each expert and part.

The name of the parameter tells the parts: `gate_up_proj` has the rows of `gate_proj` and `up_proj`. The graph tells
whether they are halves or take turns. Source: llm-compressor 0.14, `modeling/moe/`, which writes the same names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from quantize.export.swiglu import SwiGLU, swiglu_of
from quantize.graph.experts import CASTS, gathered_bias, nodes_between
from quantize.graph.labels import shape_of
from quantize.graph.linears import Linear
from quantize.graph.mixtures import Mixture, find_mixtures
from quantize.graph.program import Program
from quantize.graph.rules.table import name_of


@dataclass(frozen=True)
class Parts:
    """The linears that stand in a checkpoint in the place of one stack.

    Attributes:
        linears: the linears by path, each with the numbers int64 [n] of its rows of the stack, taken as [E · N, K].
        bias: the name of the parameter with their biases [E, N], which is written apart as well; empty for none.
        mapped: whether transformers splits the stack by itself.
        in_turns: whether the rows of two parts take turns; otherwise they follow each other.
    """

    linears: dict[str, Tensor]
    bias: str = ""
    mapped: bool = True
    in_turns: bool = False


def find_parts(program: Program) -> Iterator[tuple[str, Parts | str]]:
    """Yield the parts of each stack of a program with the stack's name, or a clause that says why there are none."""
    for mixture in (mixture for segment in program.segments for mixture in find_mixtures(program, segment)):
        found = parts_of(program, mixture)
        given: Sequence[Parts | str] = [found] * len(mixture.stacks) if isinstance(found, str) else found
        yield from ((stack.path, parts) for stack, parts in zip(mixture.stacks, given, strict=True))


def parts_of(program: Program, mixture: Mixture) -> list[Parts] | str:
    """Return the parts of the stacks of one layer, or a clause that says why there are none."""
    if len(mixture.stacks) != 2:
        return "beside more than one other stack"
    first, second = mixture.stacks
    owner, names = mixture.path, [part_names(stack.path) for stack in mixture.stacks]
    if [len(found) for found in names] != [2, 1] or first.path.rpartition(".")[0] != owner:
        return "and the names of its stacks do not tell the linears in them"
    gate = gate_between(first, second)
    if gate is None:
        return "and what lies between the products of its experts is no SwiGLU"
    biases = [bias_of(program, stack) for stack in mixture.stacks]
    own = {name for name in program.parameters.values() if name.startswith(f"{owner}.")}
    if others := own - {first.path, second.path, *biases}:
        return f"and its module holds {min(others)} as well"
    rows = torch.arange(shape_of(first.node)[-1])
    split = rows.view(-1, 2).T if gate.interleaved else rows.view(2, -1)
    orders = (split, torch.arange(shape_of(second.node)[-1])[None])
    return [
        Parts(linears_of(owner, mixture.count, parts, order), bias, mapped=False, in_turns=gate.interleaved)
        for parts, order, bias in zip(names, orders, biases, strict=True)
    ]


def part_names(path: str) -> list[str]:
    """Return the names of the linears that a stack's name is made of: `a_b_proj` is of `a_proj` and `b_proj`."""
    *parts, kind = path.rpartition(".")[2].split("_")
    return [f"{part}_{kind}" for part in parts]


def linears_of(owner: str, count: int, names: list[str], order: Tensor) -> dict[str, Tensor]:
    """Return the linears of `count` experts by path; `order` int64 [parts, n] are the rows of one expert's parts."""
    height = order.numel()
    pairs = [(e, name, rows) for e in range(count) for name, rows in zip(names, order, strict=True)]
    return {f"{owner}.{e}.{name}": e * height + rows for e, name, rows in pairs}


def gate_between(first: Linear, second: Linear) -> SwiGLU | None:
    """Return the SwiGLU between two products of experts, or None if there is something else."""
    nodes, width = nodes_between(first, second), shape_of(first.node)[-1]
    if nodes is None or width != 2 * second.columns:
        return None
    with contextlib.suppress(RuntimeError):  # a view of it may have a size that other rows do not have
        return swiglu_of(running(nodes, first.node, second.source), width)
    return None


def running(nodes: list[fx.Node], given: fx.Node, wanted: fx.Node) -> Callable[[Tensor], Tensor]:
    """Return what nodes compute of `given` [..., N], from [S, N] to [S, K], without biases and in one dtype."""

    def run(rows: Tensor) -> Tensor:
        values = {given: rows.clone().reshape(*[1] * (len(shape_of(given)) - 2), *rows.shape)}

        def value(node: fx.Node) -> Tensor:
            return values[node] if node in values else torch.zeros(())

        for node in nodes:
            compute: Any = (lambda x, *_, **__: x) if name_of(node) in CASTS else node.target
            args, options = map_arg(node.args, value), map_arg(node.kwargs, value)
            values[node] = compute(*args, **options)
        return values[wanted].reshape(len(rows), -1)

    return run


def bias_of(program: Program, linear: Linear) -> str:
    """Return the name of the parameter [E, N] of which each row's product gets the row of its expert added, or ''."""
    sums = (user for user in linear.node.users if name_of(user) in {"add", "add_"})
    added = (node.args[0] for user in sums for node in user.all_input_nodes if gathered_bias(node))
    return next((program.parameters[x] for x in added if isinstance(x, fx.Node) and x in program.parameters), "")
