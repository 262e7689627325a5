"""A graph that the exporter made of short inputs may hold for these alone; bounds and a run without values show it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from quantize.errors import ExportError
from quantize.graph.export import quiet
from quantize.graph.inputs import BATCH, SEQUENCE, Input
from quantize.graph.interpreter import Overrides, run_nodes, start
from quantize.graph.program import Program


def check_length(program: Program, inputs: Mapping[str, Input], length: int) -> None:
    """Check that a graph runs on inputs of some length, as `forward` may branch on it (chunks, blocks, windows).

    Args:
        program: the exported graph.
        inputs: the inputs that it was exported with.
        length: the number of tokens.

    Raises:
        ExportError: the graph runs on as many tokens as it was exported with, and not on this number.
    """
    bounded = any(length > longest(program.inputs[name]) for name, found in inputs.items() if len(found.dynamic) > 1)
    if not bounded and (
        runs(program, inputs, program.batch or BATCH + 1, length)
        or not runs(program, inputs, program.batch or BATCH, SEQUENCE)
    ):
        return
    raise ExportError(f"its graph depends on the number of tokens, and does not run on {length}")


def longest(node: fx.Node) -> float:
    """Return the largest number of tokens [batch, tokens, ...] for which the exporter found its graph to hold."""
    size = node.meta["val"].shape[1]
    if isinstance(size, int):
        return size
    upper = size.node.shape_env.bound_sympy(size.node.expr).upper
    return int(upper) if upper.is_Integer else float("inf")


def runs(program: Program, inputs: Mapping[str, Input], batch: int, length: int) -> bool:
    """Return whether a graph runs without values on a batch of some length."""
    try:
        with quiet(), FakeTensorMode(allow_non_fake_inputs=True):
            given = {name: resized(found, batch, length) for name, found in inputs.items()}
            weights = {name: torch.empty(node.meta["val"].shape) for node, name in program.parameters.items()}
            values = start(program, given)
            for segment in program.segments:
                run_nodes(program, segment.nodes, values, Overrides(weights))
    except Exception:  # operators of all kinds
        return False
    return True


def resized(found: Input, batch: int, length: int) -> Tensor:
    """Return an input of zeros with another batch and length, where these may vary."""
    sizes = dict(zip(found.dynamic, (batch, length), strict=False))
    shape = [sizes.get(axis, size) for axis, size in enumerate(found.example.shape)]
    return torch.zeros(shape, dtype=found.example.dtype)
