"""The cache as part of attention."""

from __future__ import annotations

import onnx_ir
from onnx_ir.passes import InPlacePass, PassResult

from quantize.export.onnx.rewrites.matching import attribute, constant, made_by, replace, rewritten_any

HEADS, TOKENS = 1, -2  # axes of keys and values [batch, heads, tokens, head_dim]


class CacheInAttention(InPlacePass):  # type: ignore[misc]
    """Concat(past, new), repeated for groups of query heads, then Attention → Attention(new, past), one node.

    Attention appends to the cache and shares key/value heads among query heads by itself. Chosen over
    `com.microsoft::GroupQueryAttention`, which copies the cache as well unless it is told to work in place
    (`in_place`), then took 1.0 to 1.4 times as long for a token behind 128 to 2048 others (32 and 8 heads of 64), and
    refuses several samples behind a cache.

    Source: ONNX operators, Attention-23.
    """

    def call(self, model: onnx_ir.Model) -> PassResult:
        """Rewrite each attention whose keys and values are a cache and new tokens."""
        return rewritten_any(model, "Attention", take_cache)


def take_cache(graph: onnx_ir.Graph, node: onnx_ir.Node) -> bool:
    """One attention; whether it was rewritten."""
    query, key, value, *mask = node.inputs
    keys, values = appended(key), appended(value)
    if keys is None or values is None or len(node.outputs) != 1 or len(mask) > 1:
        return False
    inputs = [query, keys.inputs[1], values.inputs[1], *(mask or [None]), keys.inputs[0], values.inputs[0]]
    attributes = {name: found.value for name, found in node.attributes.items()}
    attention = onnx_ir.node("Attention", inputs, attributes, num_outputs=3)
    made = [node.outputs[0], keys.outputs[0], values.outputs[0]]
    replace(graph, node, [attention], dict(zip(made, attention.outputs, strict=True)))
    return True


def appended(value: onnx_ir.Value | None) -> onnx_ir.Node | None:
    """The Concat of past and new tokens behind keys or values, heads repeated or not."""
    repeated = heads_repeated(value)
    node = made_by(value if repeated is None else repeated, "Concat")
    if node is None or len(node.inputs) != 2 or attribute(node, "axis") not in (TOKENS, TOKENS + 4):
        return None
    past = node.inputs[0]
    return node if past is not None and past.shape is not None and len(past.shape) == 4 else None


def heads_repeated(value: onnx_ir.Value | None) -> onnx_ir.Value | None:
    """What Unsqueeze, Expand, Reshape repeat so that each head stands several times in a row; None if they do not."""
    reshape = made_by(value, "Reshape")
    expand = made_by(reshape.inputs[0], "Expand") if reshape else None
    unsqueeze = made_by(expand.inputs[0], "Unsqueeze") if expand else None
    if unsqueeze is None or value is None or value.shape is None or len(value.shape) != 4:
        return None
    axes = constant(unsqueeze.inputs[1])
    return unsqueeze.inputs[0] if axes is not None and axes.tolist() == [HEADS + 1] else None
