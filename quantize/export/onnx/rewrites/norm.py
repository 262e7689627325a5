"""The norm after a residual sum computes the sum as well."""

from __future__ import annotations

import onnx_ir
from onnx_ir.passes import InPlacePass, PassResult

from quantize.export.onnx.rewrites.matching import attribute, made_by, replace, rewritten_any

# Norm → the operator of ONNX Runtime, and which of its outputs is the sum
FUSED = {
    "RMSNormalization": ("SkipSimplifiedLayerNormalization", 3),
    "LayerNormalization": ("SkipLayerNormalization", 3),
}
EPSILON = 1e-5  # the default of both norms


class AddInNorm(InPlacePass):  # type: ignore[misc]
    """Add, followed by RMSNormalization or LayerNormalization → one node that returns the sum as well.

    Source: onnxruntime, docs/ContribOperators.md, com.microsoft.SkipSimplifiedLayerNormalization.
    """

    def call(self, model: onnx_ir.Model) -> PassResult:
        """Rewrite each norm of a sum of two values of equal shape."""
        done = [rewritten_any(model, op_type, take_sum).modified for op_type in FUSED]
        return PassResult(model, any(done))


def take_sum(graph: onnx_ir.Graph, node: onnx_ir.Node) -> bool:
    """Rewrite one norm if it is such; return whether it was."""
    add = made_by(node.inputs[0], "Add")
    if add is None or attribute(node, "axis", -1) not in (-1, 2) or len(node.outputs) != 1:
        return False
    shapes = [None if value is None else value.shape for value in add.inputs]
    if shapes[0] is None or len(shapes[0]) != 3 or shapes[0] != shapes[1]:
        return False
    op_type, place = FUSED[node.op_type]
    attributes = {"epsilon": attribute(node, "epsilon", EPSILON)}
    fused = onnx_ir.node(
        op_type, [*add.inputs, *node.inputs[1:]], attributes, domain="com.microsoft", num_outputs=place + 1
    )
    replace(graph, node, [fused], {node.outputs[0]: fused.outputs[0], add.outputs[0]: fused.outputs[place]})
    return True
