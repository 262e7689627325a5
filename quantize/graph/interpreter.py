"""Nodes of a program run on real values, and weights or whole linears may be replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from quantize.errors import QuantizeError
from quantize.graph.failure import why_node_fails
from quantize.graph.program import Program

Values = dict[fx.Node, Any]


@dataclass(frozen=True)
class Overrides:
    """The weights and operators that a stretch of the program runs with.

    Attributes:
        weights: parameter name → value.
        linears: linear node → what runs instead: input (and where the rows of each expert end) → output.
        operators: any other node → what runs instead on the node's own arguments.
        product_dtype: what quantized linears round the operands of their products to, where they run on many batches.
    """

    weights: dict[str, Tensor]
    linears: dict[fx.Node, Callable[..., Tensor]] = field(default_factory=dict)
    operators: Mapping[fx.Node, Callable[..., Any]] = field(default_factory=dict)
    product_dtype: torch.dtype = torch.float32


def free_replaced(program: Program, state: Overrides, names: Iterable[str]) -> None:
    """Drop those of some weights that only replaced linears have read."""
    for name in set(names):
        if program.readers(name) <= state.linears.keys():
            state.weights.pop(name, None)


def start(program: Program, given: Tensor | Mapping[str, Tensor]) -> Values:
    """Return the values before the first node: the inputs by name (a tensor is the only input), and the switches."""
    if isinstance(given, Tensor):
        given = dict(zip(program.inputs, [given], strict=True))
    return {**{program.inputs[name]: value.to(program.device) for name, value in given.items()}, **program.constants}


@torch.no_grad()
def run_nodes(program: Program, nodes: Iterable[fx.Node], values: Values, state: Overrides) -> None:
    """Compute nodes in order, adding their values to `values` and dropping each value after its last use.

    What only turns a stack of weights around is computed where it is used, so that no value holds weights.
    """
    for node in (n for n in nodes if n not in program.turned_stacks):
        values[node] = run_node(program, node, values, state)
        for source in program.last_used_by.get(node, ()):
            values.pop(source, None)


def run_node(program: Program, node: fx.Node, values: Values, state: Overrides) -> Any:
    """Compute one node's value.

    Raises:
        QuantizeError: its operator does not take its operands.
    """
    if node.op == "get_attr":
        return program.module.get_submodule(str(node.target))

    def value(n: fx.Node) -> Any:
        return value_of(program, n, values, state)

    if replaced := state.linears.get(node):
        return replaced(*map(value, program.operands(node)))
    run: Any = state.operators.get(node, node.target)
    operands, named = map_arg(node.args, value), map_arg(node.kwargs, value)
    try:
        return run(*operands, **named)
    except (IndexError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "same dtype" in str(error):
            raise  # of a whole block, which knows what to do
        raise QuantizeError(why_node_fails(program, node, operands, error)) from error


def value_of(program: Program, node: fx.Node, values: Values, state: Overrides) -> Any:
    """Return the value of an operand: a weight, a buffer, or what was computed."""
    if node in program.parameters:
        return state.weights[program.parameters[node]]
    if node in program.turned_stacks:
        return run_node(program, node, values, state)
    return program.buffers[node] if node in program.buffers else values[node]
