"""Linears that read the same activations are merged into one."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassResult

from quantize.export.onnx.rewrites.matching import constant, initializer, made_by

# Operator → its inputs that belong to output channels, and the axis of the channels
PARTS = {"MatMulNBits": {1: 0, 2: 0, 3: 0, 5: 0}, "MatMulIntegerToFloat": {1: 1, 3: 0, 5: 0}}
BIAS = {"MatMulNBits": 5}  # zeros stand for a bias that is not there


class MergeLinears(InPlacePass):  # type: ignore[misc]
    """Several linears of one input (queries, keys and values; gate and up) → one linear and a Split.

    One larger product keeps all cores busy and starts them once. Products of a part of the columns, which are added to
    others, stay apart, because merging copies their parts: that took 1.2 to 2 times as long (2 × 2048 rows, 16 groups).
    """

    def call(self, model: onnx_ir.Model) -> PassResult:
        """Merge linears that have the same `kind` and input."""
        groups: dict[tuple[Any, ...], list[onnx_ir.Node]] = defaultdict(list)
        for node in model.graph:
            whole = node.op_type in PARTS and made_by(node.inputs[0], "Split") is None
            if whole and all(value is None or constant(value) is not None for value in parts(node)):
                groups[kind(node)].append(node)
        several = [nodes for nodes in groups.values() if len(nodes) > 1]
        for number, nodes in enumerate(several):
            merge(model.graph, nodes, f"merged.{number}")
        return PassResult(model, bool(several))


def parts(node: onnx_ir.Node) -> list[onnx_ir.Value | None]:
    """Return the inputs that belong to output channels."""
    return [node.inputs[i] if i < len(node.inputs) else None for i in PARTS[node.op_type]]


def kind(node: onnx_ir.Node) -> tuple[Any, ...]:
    """Return what merged linears must share: operator, attributes but N, other inputs, and which inputs exist."""
    settings = sorted((name, held.value) for name, held in node.attributes.items() if name != "N")
    own = PARTS[node.op_type]
    shared = [constant_or_value(value) for i, value in enumerate(node.inputs) if i not in own]
    optional = [i < len(node.inputs) and node.inputs[i] is not None for i in own if i != BIAS.get(node.op_type)]
    return (node.op_type, *shared, *settings, *optional)


def constant_or_value(value: onnx_ir.Value | None) -> Any:
    """Return a key that is equal for equal values: the value itself, or the constant that it holds."""
    array = constant(value)
    return value if array is None else (str(array.dtype), array.tobytes())


def merge(graph: onnx_ir.Graph, nodes: list[onnx_ir.Node], name: str) -> None:
    """Replace several linears by one."""
    first, own = nodes[0], PARTS[nodes[0].op_type]
    sizes = [width(node) for node in nodes]
    inputs = list(first.inputs) + [None] * (max(own) + 1 - len(first.inputs))
    for place, axis in own.items():
        arrays = [array for array in (tensor(node, place) for node in nodes) if array is not None]
        needed = arrays and (place != BIAS.get(first.op_type) or any(array.any() for array in arrays))
        inputs[place] = initializer(graph, f"{name}.{place}", np.concatenate(arrays, axis)) if needed else None
    attributes = {key: held.value for key, held in first.attributes.items()}
    attributes |= {"N": sum(sizes)} if "N" in attributes else {}
    product = onnx_ir.node(first.op_type, inputs, attributes, domain=first.domain)
    lengths = initializer(graph, f"{name}.sizes", np.array(sizes))
    split = onnx_ir.node("Split", [product.outputs[0], lengths], {"axis": -1}, num_outputs=len(nodes))
    graph.insert_before(first, [product, split])
    for node, output in zip(nodes, split.outputs, strict=True):
        output.shape, output.type = node.outputs[0].shape, node.outputs[0].type
        onnx_ir.convenience.replace_all_uses_with(node.outputs[0], output)
    graph.remove(nodes, safe=True)


def width(node: onnx_ir.Node) -> int:
    """Return the number of output channels of a linear."""
    return int(node.inputs[1].shape[PARTS[node.op_type][1]])


def tensor(node: onnx_ir.Node, place: int) -> NDArray[Any] | None:
    """Return one of the inputs; zeros stand for a bias that is not there."""
    if place < len(node.inputs) and node.inputs[place] is not None:
        return constant(node.inputs[place])
    return np.zeros(width(node), np.float32) if place == BIAS.get(node.op_type) else None
