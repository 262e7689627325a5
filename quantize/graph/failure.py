"""What an operator says of its operands becomes one sentence about the module that it stands in."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantize.errors import reason
from quantize.graph.linears import ATEN, modules_of
from quantize.graph.program import Program
from quantize.graph.refusal import place_of

LOOKUPS = (ATEN.embedding.default, ATEN.index.Tensor)
UNEQUAL = re.compile(r"size of tensor a \((\d+)\) must match the size of tensor b \((\d+)\)")
VERBOSE = "--verbose shows the whole error"


def why_node_fails(program: Program, node: fx.Node, operands: Sequence[Any], error: Exception) -> str:
    """Say in a sentence why a node of an exported graph does not run on its operands."""
    module = next((path for path in reversed(modules_of(node)) if path), "the model")
    said = None
    if node.target in LOOKUPS:
        table, rows = operands[:2]
        said = why_lookup_fails(module, table, rows[0] if isinstance(rows, list | tuple) else rows)
    elif sizes := UNEQUAL.search(str(error)):
        pairs = zip(map(int, sizes.groups()), node.args[:2], strict=False)
        held = {is_stored(program, x): size for size, x in pairs if isinstance(x, fx.Node)}
        if len(held) > 1 and held[False] > held[True]:
            said = too_few_positions(module, held[False], held[True])
    why = reason(error).rstrip(".")
    return said or (
        f"{module} does not run on the calibration data: {why}; give data that the model itself takes, and {VERBOSE}"
    )


def why_model_fails(model: nn.Module, given: Mapping[str, Tensor], error: Exception) -> str:
    """Say in a sentence why a whole model does not run on its inputs.

    Args:
        model: the model that was run.
        given: argument of `forward` → what it was given.
        error: what the run raised.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    inside = [frame for frame in frames if isinstance(frame.f_locals.get("self"), nn.Module)]
    module = inside[-1].f_locals["self"] if inside else model
    path = next((path for path, found in model.named_modules() if found is module), "")
    ids = {name: x for name, x in given.items() if x.dim() > 1 and not x.is_floating_point()}
    tokens = next((x.shape[1] for x in ids.values()), 0)
    stored = {size for tensors in (module.parameters(), module.buffers()) for x in tensors for size in x.shape}
    sizes = [int(size) for found in [UNEQUAL.search(str(error))] if found for size in found.groups()]
    if isinstance(module, nn.Embedding):
        if said := why_lookup_fails(path, module.weight, inside[-1].f_locals.get("input")):
            return said
    elif sizes and max(sizes) == tokens > min(sizes) and min(sizes) in stored:
        return too_few_positions(path or "the model", tokens, min(sizes))
    shapes = " and ".join(str(list(tensor.shape)) for tensor in given.values())
    where = "".join(f", {place}" for place in (path, place_of(error)) if place)
    hint = "give data that the model itself takes"
    if len(given) > 1:
        hint = "give every argument that its processor returns"
    elif len(ids) == 1 and "input_ids" not in ids:
        hint = f"if {next(iter(ids))} is not token ids, give calibration data with a tensor {next(iter(ids))}"
    return (
        f"the model does not run on inputs of shape {shapes}{where}: {reason(error).rstrip('.')}; {hint}, and {VERBOSE}"
    )


def why_lookup_fails(module: str, table: Tensor, rows: Tensor | None) -> str | None:
    """Say in a sentence which rows [..., tokens] a table [N, ...] lacks; None if it lacks none."""
    if rows is None or not rows.numel() or rows.dtype == torch.bool or int(rows.max()) < len(table):
        return None
    tokens, first = rows.shape[-1] if rows.dim() else 1, int(rows.min())
    if tokens > 1 and bool((rows.diff() >= 0).all()) and first + tokens > len(table):
        return too_few_positions(module, tokens, len(table) - first)
    return (
        f"{module} looks up row {int(rows.max())} of a table of {len(table)}; give calibration data whose numbers lie "
        f"below {len(table)}"
    )


def too_few_positions(module: str, tokens: int, positions: int) -> str:
    """Say in a sentence that rows are too long."""
    return (
        f"a row of the calibration data makes {tokens} tokens, and {module} has {positions} positions; give shorter "
        "rows, of text by a smaller --seqlen"
    )


def is_stored(program: Program, node: fx.Node) -> bool:
    """Return whether a value follows from parameters and buffers alone, whatever the inputs are but for their size."""
    ahead, seen, inputs = [node], set[fx.Node](), {*program.inputs.values()}
    while ahead:
        found = ahead.pop()
        if found in inputs:
            return False
        ahead += [x for x in found.all_input_nodes if x not in seen and isinstance(x.meta.get("val"), Tensor)]
        seen |= {*found.all_input_nodes}
    return True
