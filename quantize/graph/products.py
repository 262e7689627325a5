"""Products that are written as `x @ W.T`, with a bias that is added behind, become the linears that they are."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

ATEN = torch.ops.aten
TRANSPOSED = {ATEN.numpy_T.default: (), ATEN.t.default: (), ATEN.transpose.int: (0, 1), ATEN.permute.default: ([1, 0],)}


def write_as_linears(module: fx.GraphModule, parameters: Collection[fx.Node]) -> None:
    """Replace products of a value with a transposed parameter by linears, in place.

    Args:
        module: an exported graph.
        parameters: the placeholders of its parameters.
    """
    for node in list(module.graph.nodes):
        weight = transposed(node.args[1], parameters) if node.target in (ATEN.matmul.default, ATEN.mm.default) else None
        if weight is None:
            continue
        added = next(iter(node.users)) if len(node.users) == 1 else node
        bias = bias_of(added, node, parameters, (int(weight.meta["val"].shape[0]),))
        last = node if bias is None else added
        with module.graph.inserting_before(last):
            operands = (node.args[0], weight, *([] if bias is None else [bias]))
            linear = module.graph.call_function(ATEN.linear.default, operands)
        linear.meta.update(last.meta)
        last.replace_all_uses_with(linear)
        for done in dict.fromkeys((last, node)):
            module.graph.erase_node(done)
    module.graph.eliminate_dead_code()
    module.recompile()


def transposed(node: object, parameters: Collection[fx.Node]) -> fx.Node | None:
    """Return the parameter of two axes that a node is the transpose of."""
    if not isinstance(node, fx.Node) or node.target not in TRANSPOSED:
        return None
    weight, *how = node.args
    axes = sorted(how) if len(how) == 2 else how  # type: ignore[type-var]
    known = weight in parameters and weight.meta["val"].dim() == 2  # type: ignore[union-attr]
    return weight if known and tuple(axes) == TRANSPOSED[node.target] else None  # type: ignore[return-value]


def bias_of(
    added: fx.Node, product: fx.Node, parameters: Collection[fx.Node], shape: tuple[int, ...]
) -> fx.Node | None:
    """Return the parameter that a sum adds to a product as a bias; None if it is no such sum."""
    if added.target not in (ATEN.add.Tensor, ATEN.add_.Tensor) or added.kwargs or len(added.args) != 2:
        return None
    others = [x for x in added.args if x is not product]
    found = others[0] if len(others) == 1 else None
    known = isinstance(found, fx.Node) and found in parameters and tuple(found.meta["val"].shape) == shape
    return found if known else None  # type: ignore[return-value]
