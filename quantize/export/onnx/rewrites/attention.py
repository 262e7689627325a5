"""Attention appends to the cache by itself."""

from __future__ import annotations

import onnx_ir
from onnx_ir.passes import InPlacePass, PassResult

from quantize.export.onnx.rewrites.matching import attribute, constant, depends_on, made_by, replace, rewritten_any

HEADS, TOKENS = 1, -2  # axes of keys and values [batch, heads, tokens, head_dim]


class CacheInAttention(InPlacePass):  # type: ignore[misc]
    """Concat(past, new), repeated for groups of query heads, and Attention → one node Attention(new, past).

    Attention appends to the cache and shares key/value heads among query heads by itself. It is used here in place of
    `com.microsoft::GroupQueryAttention`, which also copies the cache unless it is told to work in place (`in_place`).
    That took 1.0 to 1.4 times as long for a token after 128 to 2048 others (32 and 8 heads of 64), and does not take
    several samples after a cache.

    Source: ONNX operators, Attention-23.
    """

    def call(self, model: onnx_ir.Model) -> PassResult:
        """Rewrite each attention whose keys and values consist of a cache and new tokens."""
        return rewritten_any(model, "Attention", take_cache)


def take_cache(graph: onnx_ir.Graph, node: onnx_ir.Node) -> bool:
    """Rewrite one attention if it is such; return whether it was."""
    query, key, value, *mask = node.inputs
    keys, values = appended(key), appended(value)
    if keys is None or values is None or len(node.outputs) != 1 or len(mask) > 1:
        return False
    if depends_on([query, *mask], [keys, values]):  # it would read what it has not appended yet
        return False
    inputs = [query, keys.inputs[1], values.inputs[1], *(mask or [None]), keys.inputs[0], values.inputs[0]]
    attributes = {name: found.value for name, found in node.attributes.items()}
    attention = onnx_ir.node("Attention", inputs, attributes, num_outputs=3)
    made = [node.outputs[0], keys.outputs[0], values.outputs[0]]
    replace(graph, node, [attention], dict(zip(made, attention.outputs, strict=True)))
    return True


def appended(value: onnx_ir.Value | None) -> onnx_ir.Node | None:
    """Return the Concat of past and new tokens that makes keys or values, with or without repeated heads."""
    repeated = heads_repeated(value)
    node = made_by(value if repeated is None else repeated, "Concat")
    if node is None or len(node.inputs) != 2 or attribute(node, "axis") not in (TOKENS, TOKENS + 4):
        return None
    past = node.inputs[0]
    return node if past is not None and past.shape is not None and len(past.shape) == 4 else None


def heads_repeated(value: onnx_ir.Value | None) -> onnx_ir.Value | None:
    """Return the value whose heads Unsqueeze, Expand and Reshape repeat in a row, or None if they do not."""
    reshape = made_by(value, "Reshape")
    expand = made_by(reshape.inputs[0], "Expand") if reshape else None
    unsqueeze = made_by(expand.inputs[0], "Unsqueeze") if expand else None
    if unsqueeze is None or value is None or value.shape is None or len(value.shape) != 4:
        return None
    axes = constant(unsqueeze.inputs[1])
    return unsqueeze.inputs[0] if axes is not None and axes.tolist() == [HEADS + 1] else None
