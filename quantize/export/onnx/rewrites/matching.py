"""These functions read and replace nodes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import onnx_ir
from numpy.typing import NDArray
from onnx_ir.passes import PassResult


def rewritten_any(
    model: onnx_ir.Model, op_type: str, rewrite: Callable[[onnx_ir.Graph, onnx_ir.Node], bool]
) -> PassResult:
    """Call `rewrite` with each node of a kind; it returns whether it changed anything."""
    done = [rewrite(model.graph, node) for node in list(model.graph) if node.op_type == op_type]
    return PassResult(model, any(done))


def made_by(value: onnx_ir.Value | None, op_type: str) -> onnx_ir.Node | None:
    """Return the node of that kind that makes a value, or None if another node does."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def depends_on(values: Iterable[onnx_ir.Value | None], makers: Collection[onnx_ir.Node]) -> bool:
    """Return whether one of some values is computed from what some nodes make."""
    seen, left = set[onnx_ir.Node](), [value.producer() for value in values if value is not None]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        if node in makers:
            return True
        seen.add(node)
        left += [value.producer() for value in node.inputs if value is not None]
    return False


def constant(value: onnx_ir.Value | None) -> NDArray[Any] | None:
    """Return the array of an initializer or a constant, or None for a value that is computed."""
    if value is None or value.is_graph_input() or (held := onnx_ir.convenience.get_const_tensor(value)) is None:
        return None
    found: NDArray[Any] = held.numpy()
    return found


def attribute(node: onnx_ir.Node, name: str, default: Any = None) -> Any:
    """Return an attribute's value; sequences become lists."""
    found = node.attributes.get(name)
    value = default if found is None else found.value
    return list(value) if isinstance(value, tuple | list) else value


def initializer(graph: onnx_ir.Graph, name: str, array: NDArray[Any]) -> onnx_ir.Value:
    """Add an initializer to a graph and return it."""
    tensor = onnx_ir.tensor(array, name=name)
    value = onnx_ir.Value(
        name=name, type=onnx_ir.TensorType(tensor.dtype), shape=onnx_ir.Shape(array.shape), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def replace(
    graph: onnx_ir.Graph, old: onnx_ir.Node, new: Sequence[onnx_ir.Node], values: dict[onnx_ir.Value, onnx_ir.Value]
) -> None:
    """Replace a node by other nodes, and let readers of the keys of `values` read the values that they map to."""
    for before, after in values.items():
        after.name, after.shape, after.type = before.name, before.shape, before.type
        if before.is_graph_output():
            graph.outputs[:] = [after if output is before else output for output in graph.outputs]
        onnx_ir.convenience.replace_all_uses_with(before, after)
    graph.insert_before(old, new)
    makers = dict.fromkeys([old, *(before.producer() for before in values)])
    graph.remove([node for node in makers if not any(output.uses() for output in node.outputs)], safe=True)
