"""A language model's file can hold two graphs: 4-bit products for the next token, and 8-bit products for a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir
from onnx_ir.convenience import replace_all_uses_with
from torch import Tensor

from quantize.errors import UsageError
from quantize.export.onnx.decoder import Decoder, is_causal_lm
from quantize.export.onnx.gathered_experts import lowered_copy
from quantize.export.onnx.hybrid_linear import MANY, HybridLinear, gains, is_prompt, lower_for_prompt
from quantize.export.onnx.interface import IN_PLACE, Feed, Interface
from quantize.export.onnx.lowering import lower
from quantize.export.onnx.rewrites.in_place import keep_in_place
from quantize.export.onnx.rewrites.matching import constant, initializer
from quantize.nn.quantized_linear import QuantizedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HybridDecoder(Decoder):
    """A language model whose file is `branch_on_length` of two graphs.

    For few tokens, `past_key_values` may have room for more tokens than it holds, and `present` may be bound to the
    same memory, so that nothing is copied. Then `attention_mask` says how many tokens there are.
    """

    lower = HybridLinear

    def graphs(self) -> Sequence[Interface]:
        """Return the graph for few tokens, and the one for many."""
        return [lowered_copy(self, lower), lowered_copy(self, lower_for_prompt)]

    def forward(self, feed: Feed) -> tuple[Tensor, ...]:
        """Compute like other decoders, with the linears that the file uses for so many tokens."""
        for layer in self.modules():
            if isinstance(layer, HybridLinear):
                layer.prompt = is_prompt(feed["input_ids"])
        return super().forward(feed)

    def feeds(self, seed: int) -> dict[str, Feed]:
        """Return other decoders' inputs, but with a prompt of many tokens, and with more inputs of few tokens."""
        few = {"some tokens": self.feed(1, 3, 5, seed), "a token each": self.feed(2, 1, 6, seed)}
        return few | super().feeds(seed) | {"prefill": self.feed(1, MANY, 0, seed)}


def hybrid_decoder(model: PreTrainedModel) -> HybridDecoder:
    """Make the hybrid of a causal language model with W4A8 linears.

    Raises:
        UsageError: the model has no W4A8 linears.
    """
    linears = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    if not is_causal_lm(model) or not any(map(gains, linears)):
        raise UsageError(
            "--hybrid needs a causal language model with W4A8 linears, and this model is none; leave --hybrid out"
        )
    return HybridDecoder(model)


def branch_on_length(few: onnx_ir.Model, many: onnx_ir.Model, tokens: str = "input_ids") -> onnx_ir.Model:
    """Make one model that runs `few` if its input `tokens` has fewer than `MANY`, of one sample or one of each sample.

    Otherwise it runs `many`. One If around everything costs a microsecond, and each branch is optimized as its own
    graph. Weights that both hold, such as embeddings, are stored once. Both models are consumed.

    If `few` can keep the cache in place, the model's metadata say so.
    """
    metadata = {IN_PLACE: str(MANY)} if keep_in_place(few) else {}
    inputs = [like(value, value.name) for value in few.graph.inputs]
    outputs = [like(value, value.name) for value in few.graph.outputs]
    graph = onnx_ir.Graph(inputs, outputs, nodes=[], opset_imports=few.graph.opset_imports, name="branch_on_length")
    share_initializers(graph, few.graph, many.graph)
    for name, inner in (("few", few.graph), ("many", many.graph)):
        capture_subgraph(inner, {value.name: value for value in inputs}, name)
    given = next(value for value in inputs if value.name == tokens)
    branches = {"then_branch": many.graph, "else_branch": few.graph}
    choice, wanted = is_prefill(graph, given)
    graph.extend([*choice, onnx_ir.node("If", [wanted], branches, outputs=outputs)])
    return onnx_ir.Model(graph, ir_version=few.ir_version, metadata_props=metadata)


def is_prefill(graph: onnx_ir.Graph, tokens: onnx_ir.Value) -> tuple[list[onnx_ir.Node], onnx_ir.Value]:
    """Return `is_prompt` of tokens [batch, sequence], with the nodes that compute it."""
    size, shape = onnx_ir.node("Size", [tokens]), onnx_ir.node("Shape", [tokens])
    longest = onnx_ir.node("ReduceMax", [shape.outputs[0]], {"keepdims": 0})
    several = onnx_ir.node("Greater", [size.outputs[0], longest.outputs[0]])
    enough = onnx_ir.node("GreaterOrEqual", [size.outputs[0], initializer(graph, "many", np.array(MANY))])
    either_way = onnx_ir.node("Or", [enough.outputs[0], several.outputs[0]])
    nodes = [size, shape, longest, several, enough, either_way]
    for node in nodes:
        node.outputs[0].name = f"choice.{node.op_type}"  # a name that neither branch has
    return nodes, either_way.outputs[0]


def like(value: onnx_ir.Value, name: str | None) -> onnx_ir.Value:
    """Return a new value of the same type and shape."""
    return onnx_ir.Value(name=name, type=value.type, shape=value.shape)


def share_initializers(graph: onnx_ir.Graph, *inner: onnx_ir.Graph) -> None:
    """Move initializers that all of `inner` hold, with the same name and the same values, into `graph`."""
    for name in list(inner[0].initializers):
        values = [other.initializers[name] for other in inner if name in other.initializers]
        arrays = [array for array in map(constant, values) if array is not None]
        if len(arrays) == len(inner) and all(np.array_equal(arrays[0], array) for array in arrays[1:]):
            shared = initializer(graph, name, arrays[0])
            for other, value in zip(inner, values, strict=True):
                replace_all_uses_with(value, shared)
                del other.initializers[name]


def capture_subgraph(inner: onnx_ir.Graph, inputs: dict[str | None, onnx_ir.Value], name: str) -> None:
    """Make a graph a branch of an If, which reads the values around it and gives its outputs names of their own."""
    inner.name = name
    for value in inner.inputs:
        replace_all_uses_with(value, inputs[value.name])
    inner.inputs.clear()
    for value in inner.outputs:
        value.name = f"{name}.{value.name}"
