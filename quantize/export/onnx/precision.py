"""The precisions in which a file's products run are counted."""

from __future__ import annotations

from collections import Counter

import onnx_ir

from quantize.export.onnx.rewrites.matching import attribute, constant, made_by

INTEGERS = "8-bit weights, 8-bit activations by token, 32-bit sums"  # values of 4 and 6 bits are held in 8 bits
PRODUCTS = ("MatMul", "Gemm", "FusedMatMul")


def precision_counts(model: onnx_ir.Model) -> dict[str, int]:
    """Return precision → number of products with weights that run in it, sorted."""
    found = Counter(precision(node) for node in model.graph if takes_weights(node))
    return dict(sorted(found.items()))


def takes_weights(node: onnx_ir.Node) -> bool:
    """Return whether a node is a product with a constant matrix."""
    if node.op_type not in PRODUCTS:
        return str(node.op_type).startswith(("MatMulNBits", "MatMulInteger"))
    turned = made_by(node.inputs[1], "Transpose")  # the exporter leaves the Transpose of a large table as it is
    return constant(node.inputs[1] if turned is None else turned.inputs[0]) is not None


def precision(node: onnx_ir.Node) -> str:
    """Describe the precision of a product in words."""
    if node.op_type == "MatMulNBits":
        block = f"8-bit activations in blocks of {attribute(node, 'block_size')}"
        return f"4-bit weights, {block if attribute(node, 'accuracy_level') == 4 else 'float32 activations'}"
    return INTEGERS if "Integer" in node.op_type else "float32"
