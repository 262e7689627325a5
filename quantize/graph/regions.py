"""What `forward` runs without gradients, or with autocast off, the exporter puts into graphs of their own."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from quantize.errors import ExportError

GRADIENTS, AUTOCAST = (
    getattr(torch.ops.higher_order, f"wrap_with_{name}") for name in ("set_grad_enabled", "autocast")
)


def inline_regions(module: fx.GraphModule) -> None:
    """Put the nodes of such regions into the graph around them, in place, so that their linears and tables are found.

    Raises:
        ExportError: a region has autocast on, and so computes in another type than a run does.
    """
    if any(node.target is AUTOCAST and node.args[2] for node in module.graph.nodes):
        raise ExportError("it turns autocast on")
    while region := next((node for node in module.graph.nodes if inner_graph(module, node) is not None), None):
        inline(module, region)
    module.graph.eliminate_dead_code()
    module.recompile()


def inner_graph(module: fx.GraphModule, node: fx.Node) -> tuple[fx.GraphModule, tuple[Any, ...]] | None:
    """Return the graph of a region and its operands; None for other nodes."""
    first = {GRADIENTS: 1, AUTOCAST: 4}.get(node.target)
    if first is None:
        return None
    source, *operands = node.args[first:]
    inner = module.get_submodule(str(source.target)) if isinstance(source, fx.Node) else None
    return (inner, tuple(operands)) if isinstance(inner, fx.GraphModule) else None


def inline(module: fx.GraphModule, region: fx.Node) -> None:
    """Put the nodes of one region into the graph around it; what it holds gets a name of its own there."""
    found = inner_graph(module, region)
    assert found is not None
    inner, operands = found
    places = [node for node in inner.graph.nodes if node.op == "placeholder"]
    copies: dict[fx.Node, Any] = dict(zip(places, operands, strict=True))
    with module.graph.inserting_before(region):
        for node in (node for node in inner.graph.nodes if node.op not in ("placeholder", "output")):
            copies[node] = module.graph.node_copy(node, lambda n: copies[n])
            if node.op == "get_attr":
                name = f"{copies[node].name}_inlined"
                setattr(module, name, operator.attrgetter(str(node.target))(inner))
                copies[node].target = name
    output = next(node for node in inner.graph.nodes if node.op == "output")
    results: Any = map_arg(output.args[0], lambda n: copies[n])
    for user in list(region.users):
        if isinstance(results, list | tuple) and user.target is operator.getitem:
            place: Any = user.args[1]
            user.replace_all_uses_with(results[place])
            module.graph.erase_node(user)
    if region.users:
        region.replace_all_uses_with(results)
    module.graph.erase_node(region)
