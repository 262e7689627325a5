"""Tied embeddings are stored once in the file."""

from __future__ import annotations

import numpy as np
import onnx_ir
from onnx_ir.passes import InPlacePass, PassResult

from quantize.export.onnx.rewrites.matching import attribute, constant, made_by, replace, rewritten_any


class StoreTiedOnce(InPlacePass):  # type: ignore[misc]
    """MatMul with the transpose of a table that Gather reads → FusedMatMul with the table itself.

    Source: onnxruntime, docs/ContribOperators.md, com.microsoft.FusedMatMul.
    """

    def call(self, model: onnx_ir.Model) -> PassResult:
        """Rewrite each product with such a transpose."""
        return rewritten_any(model, "MatMul", share)


class TurnTied(InPlacePass):  # type: ignore[misc]
    """The same in standard operators: MatMul with a Transpose of the table, which a runtime computes once."""

    def call(self, model: onnx_ir.Model) -> PassResult:
        """Rewrite each product with a transposed copy."""
        return rewritten_any(model, "MatMul", turn)


def share(graph: onnx_ir.Graph, node: onnx_ir.Node) -> bool:
    """Rewrite one product if it is such; return whether it was."""
    if (table := tied_table(graph, node)) is None:
        return False
    fused = onnx_ir.node("FusedMatMul", [node.inputs[0], table], {"transB": 1}, domain="com.microsoft")
    replace(graph, node, [fused], {node.outputs[0]: fused.outputs[0]})
    return True


def turn(graph: onnx_ir.Graph, node: onnx_ir.Node) -> bool:
    """Rewrite one product if it is such; return whether it was."""
    if (table := tied_table(graph, node)) is None or made_by(node.inputs[1], "Transpose") is not None:
        return False
    transpose = onnx_ir.node("Transpose", [table], {"perm": [1, 0]})
    product = onnx_ir.node("MatMul", [node.inputs[0], transpose.outputs[0]])
    replace(graph, node, [transpose, product], {node.outputs[0]: product.outputs[0]})
    return True


def tied_table(graph: onnx_ir.Graph, node: onnx_ir.Node) -> onnx_ir.Value | None:
    """Return the table that Gather reads and whose transpose a product reads, or None."""
    lookups = (other for other in graph if other.op_type == "Gather" and attribute(other, "axis", 0) == 0)
    return next((lookup.inputs[0] for lookup in lookups if is_transpose(node.inputs[1], lookup.inputs[0])), None)


def is_transpose(weight: onnx_ir.Value, table: onnx_ir.Value) -> bool:
    """Return whether a matrix is a table [rows, columns] transposed, by a node or by the exporter."""
    transpose, columns, rows = made_by(weight, "Transpose"), constant(weight), constant(table)
    if transpose is not None:
        return transpose.inputs[0] is table and attribute(transpose, "perm") == [1, 0]
    if columns is None or rows is None or columns.ndim != 2 or rows.shape != columns.shape[::-1]:
        return False
    return rows.dtype == columns.dtype and np.array_equal(rows, columns.T)
