"""Tied embeddings once in the file."""

from __future__ import annotations

import numpy as np
import onnx_ir
from onnx_ir.passes import InPlacePass, PassResult

from quantize.export.rewrites.matching import attribute, constant, made_by, replace, rewritten_any


class StoreTiedOnce(InPlacePass):  # type: ignore[misc]
    """MatMul with the transpose of a table that Gather reads → FusedMatMul with the table itself.

    Source: onnxruntime, docs/ContribOperators.md, com.microsoft.FusedMatMul.
    """

    def call(self, model: onnx_ir.Model) -> PassResult:
        """Rewrite each product with such a transpose."""
        return rewritten_any(model, "MatMul", share)


def share(graph: onnx_ir.Graph, node: onnx_ir.Node) -> bool:
    """One product; whether it was rewritten."""
    x, weight = node.inputs
    lookups = (other for other in graph if other.op_type == "Gather" and attribute(other, "axis", 0) == 0)
    for table in (lookup.inputs[0] for lookup in lookups):
        if is_transpose(weight, table):
            fused = onnx_ir.node("FusedMatMul", [x, table], {"transB": 1}, domain="com.microsoft")
            replace(graph, node, [fused], {node.outputs[0]: fused.outputs[0]})
            return True
    return False


def is_transpose(weight: onnx_ir.Value, table: onnx_ir.Value) -> bool:
    """Whether a matrix is a table [rows, columns] transposed, by a node or by the exporter."""
    transpose, columns, rows = made_by(weight, "Transpose"), constant(weight), constant(table)
    if transpose is not None:
        return transpose.inputs[0] is table and attribute(transpose, "perm") == [1, 0]
    if columns is None or rows is None or columns.ndim != 2 or rows.shape != columns.shape[::-1]:
        return False
    return np.array_equal(rows, columns.T)
