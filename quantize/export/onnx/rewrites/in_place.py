"""The cache stays in its memory when few tokens are added, so that nothing is copied for each of them."""

from __future__ import annotations

import numpy as np
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from quantize.export.onnx.rewrites.matching import attribute, initializer, replace

LENGTH = 2  # axis of keys and values [batch, heads, tokens, head_dim]
Counts = tuple[onnx_ir.Value, onnx_ir.Value]


def keep_in_place(model: onnx_ir.Model, tokens: str = "input_ids", mask: str = "attention_mask") -> bool:
    """Turn Attention into GroupQueryAttention, which works in place; return whether that could be done.

    GroupQueryAttention writes new keys and values after the ones it is given, if `past` and `present` are the same
    memory with room for them; otherwise it copies like Attention. So the number of tokens in a cache is no longer read
    off the cache's shape, but off the shape of the mask, [batch, past + sequence]. The operator takes one sample, or
    one token of each sample; hidden tokens get the lowest float as a bias.

    Source: onnxruntime, docs/ContribOperators.md, com.microsoft.GroupQueryAttention.
    """
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    attentions = [node for node in graph if node.op_type == "Attention"]
    past = [value for node in attentions for value in node.inputs[4:6]]
    if not {tokens, mask} <= set(inputs) or not all(map(can_be, attentions)) or not all(map(only_measured, past)):
        return False
    counts, behind = counted(graph, inputs[tokens], inputs[mask])
    for value in past:
        for shape in [node for node in value.consumers() if node.op_type == "Shape" and measures_length(node)]:
            onnx_ir.convenience.replace_all_uses_with(shape.outputs[0], behind)
    for node in attentions:
        group(graph, node, counts)
    RemoveUnusedNodesPass()(model)
    return bool(attentions)


def can_be(node: onnx_ir.Node) -> bool:
    """Return whether an attention has a cache, heads in one axis, and nothing that the other operator lacks."""
    heads = attribute(node, "q_num_heads", 0)
    return heads > 0 and len(node.inputs) == 6 and all(node.inputs[4:6]) and not attribute(node, "softcap", 0.0)


def only_measured(past: onnx_ir.Value) -> bool:
    """Return whether keys or values are read only by attentions and by shapes of one axis each."""
    others = [node for node in past.consumers() if node.op_type not in ("Attention", "Shape")]
    return not others and all(
        attribute(node, "end", 4) - attribute(node, "start", 0) == 1
        for node in past.consumers()
        if node.op_type == "Shape"
    )


def measures_length(shape: onnx_ir.Node) -> bool:
    """Return whether a Shape is only that of the tokens."""
    return bool(attribute(shape, "start", 0) == LENGTH)


def counted(graph: onnx_ir.Graph, tokens: onnx_ir.Value, mask: onnx_ir.Value) -> tuple[Counts, onnx_ir.Value]:
    """Return GroupQueryAttention's counts (last positions int32 [batch], sum of tokens int32 []) and the past [1]."""
    new: list[onnx_ir.Node] = []

    def made(op_type: str, *operands: onnx_ir.Value, **attributes: int) -> onnx_ir.Value:
        new.append(onnx_ir.node(op_type, operands, attributes))
        return new[-1].outputs[0]

    one, none = (initializer(graph, f"in_place.{n}", np.array([n])) for n in (1, 0))
    total, batch = made("Shape", mask, start=1, end=2), made("Shape", mask, start=0, end=1)
    behind = made("Sub", total, made("Shape", tokens, start=1, end=2))
    last = made("Cast", made("Sub", total, one), to=onnx_ir.DataType.INT32)
    counts = made("Expand", last, batch), made("Squeeze", made("Cast", total, to=onnx_ir.DataType.INT32), none)
    graph.insert_before(graph[0], new)
    return counts, behind


def group(graph: onnx_ir.Graph, node: onnx_ir.Node, counts: Counts) -> None:
    """Rewrite one attention."""
    query, key, value, mask, *past = node.inputs
    new, bias = bias_of(graph, mask)
    attributes = {"num_heads": attribute(node, "q_num_heads"), "kv_num_heads": attribute(node, "kv_num_heads")}
    attributes |= {"scale": found} if (found := attribute(node, "scale")) else {}
    inputs = [query, key, value, *past, *counts, None, None, None, bias]
    grouped = onnx_ir.node("GroupQueryAttention", inputs, attributes, domain="com.microsoft", num_outputs=3)
    replace(graph, node, [*new, grouped], dict(zip(node.outputs, grouped.outputs, strict=True)))


def bias_of(graph: onnx_ir.Graph, mask: onnx_ir.Value | None) -> tuple[list[onnx_ir.Node], onnx_ir.Value | None]:
    """Return a mask [batch, 1, sequence, past + sequence] as a bias of scores, after the new nodes that compute it."""
    if mask is None or mask.dtype != onnx_ir.DataType.BOOL:
        return [], mask
    if made := [node for node in mask.consumers() if node.op_type == "Where" and node.inputs[0] is mask]:
        return [], made[0].outputs[0]
    shown, hidden = (np.array(x, np.float32) for x in (0, np.finfo(np.float32).min))
    ends = [initializer(graph, f"{mask.name}.{name}", x) for name, x in (("shown", shown), ("hidden", hidden))]
    where = onnx_ir.node("Where", [mask, *ends])
    return [where], where.outputs[0]
