"""Attention reads tokens as linears write them, so that no head is moved."""

from __future__ import annotations

import numpy as np
import onnx_ir
from onnx_ir.passes import InPlacePass, PassResult

from quantize.export.onnx.rewrites.matching import attribute, initializer, made_by, replace, rewritten_any

SWAPPED = [0, 2, 1, 3]  # [batch, tokens, heads, head_dim] ↔ [batch, heads, tokens, head_dim]
Steps = tuple[onnx_ir.Value, list[onnx_ir.Node]]  # a value, and the new nodes that compute it


class HeadsInPlace(InPlacePass):  # type: ignore[misc]
    """Transposed heads around RotaryEmbedding and Attention → both on [batch, tokens, heads · head_dim].

    This is done only if queries, keys and values of an attention are all transposed, with nothing but positions
    between.
    """

    def call(self, model: onnx_ir.Model) -> PassResult:
        """Rewrite each attention of this kind."""
        return rewritten_any(model, "Attention", flatten)


def flatten(graph: onnx_ir.Graph, node: onnx_ir.Node) -> bool:
    """Rewrite one attention if it can be; return whether it was."""
    operands = [flat(graph, value) for value in node.inputs[:3]]
    output = joined(node.outputs[0])
    found = [operand for operand in operands if operand is not None]
    nodes = [step for _, steps in found for step in steps]
    if output is None or len(found) < len(operands):
        for step in nodes:
            forget(step)
        return False
    query, key = (int(value.shape[1]) for value in node.inputs[:2])
    attributes = {name: held.value for name, held in node.attributes.items()}
    attributes |= {"q_num_heads": query, "kv_num_heads": key}
    inputs = [*(value for value, _ in found), *node.inputs[3:]]
    attention = onnx_ir.node("Attention", inputs, attributes, num_outputs=len(node.outputs))
    made = zip([output, *node.outputs[1:]], attention.outputs, strict=True)
    replace(graph, node, [*nodes, attention], dict(made))
    return True


def forget(node: onnx_ir.Node) -> None:
    """Let a new node that is not needed read nothing, as its operands count their readers."""
    for place in range(len(node.inputs)):
        node.replace_input_with(place, None)


def flat(graph: onnx_ir.Graph, value: onnx_ir.Value) -> Steps | None:
    """Turn [batch, heads, tokens, head_dim] into [batch, tokens, heads · head_dim]; None if it was not transposed."""
    if (rotary := made_by(value, "RotaryEmbedding")) is not None:
        if (inner := flat(graph, rotary.inputs[0])) is None:
            return None
        attributes = {name: held.value for name, held in rotary.attributes.items()}
        attributes["num_heads"] = int(value.shape[1])
        turned = onnx_ir.node("RotaryEmbedding", [inner[0], *rotary.inputs[1:]], attributes)
        return turned.outputs[0], [*inner[1], turned]
    transpose = made_by(value, "Transpose")
    return None if transpose is None or attribute(transpose, "perm") != SWAPPED else tokens(graph, transpose.inputs[0])


def tokens(graph: onnx_ir.Graph, value: onnx_ir.Value) -> Steps:
    """Turn [batch, tokens, heads, head_dim] into [batch, tokens, heads · head_dim]."""
    split = made_by(value, "Reshape")
    if split is not None and width(split.inputs[0]) == value.shape[2] * value.shape[3]:
        return split.inputs[0], []
    shape = graph.initializers.get("tokens_first") or initializer(graph, "tokens_first", np.array([0, 0, -1]))
    reshape = onnx_ir.node("Reshape", [value, shape])
    return reshape.outputs[0], [reshape]


def joined(value: onnx_ir.Value) -> onnx_ir.Value | None:
    """Return the value [batch, tokens, heads · head_dim] that the only reader makes of one by heads, or None."""
    if len(value.uses()) != 1 or value.is_graph_output():
        return None
    node, output = value.consumers()[0], value.consumers()[0].outputs[0]
    if node.op_type == "Reshape" and output.shape == value.shape:
        return joined(output)
    if node.op_type == "Transpose" and attribute(node, "perm") == SWAPPED and len(output.uses()) == 1:
        last = output.consumers()[0]
        fits = last.op_type == "Reshape" and width(last.outputs[0]) == value.shape[1] * value.shape[3]
        return last.outputs[0] if fits else None
    return None


def width(value: onnx_ir.Value) -> int | None:
    """Return the channels of [batch, tokens, channels], or None for other shapes."""
    known = value.shape is not None and len(value.shape) == 3 and isinstance(value.shape[2], int)
    return int(value.shape[2]) if known else None
