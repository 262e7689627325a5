"""In which precision a file's products run."""

from __future__ import annotations

from collections import Counter

import onnx_ir

from quantize.export.onnx.rewrites.matching import attribute, constant, made_by

INTEGERS = "8-bit weights, 8-bit activations by token, 32-bit sums"  # 4- and 6-bit values are held in 8 bits
PRODUCTS = ("MatMul", "Gemm", "FusedMatMul")


def precision_counts(model: onnx_ir.Model) -> dict[str, int]:
    """What products with weights run in → how many there are, sorted."""
    found = Counter(precision(node) for node in model.graph if takes_weights(node))
    return dict(sorted(found.items()))


def takes_weights(node: onnx_ir.Node) -> bool:
    """Whether a node is a product with a matrix that is no value of the run."""
    if node.op_type not in PRODUCTS:
        return str(node.op_type).startswith(("MatMulNBits", "MatMulInteger"))
    turned = made_by(node.inputs[1], "Transpose")  # of a large table, which the exporter leaves as it is
    return constant(node.inputs[1] if turned is None else turned.inputs[0]) is not None


def precision(node: onnx_ir.Node) -> str:
    """In words."""
    if node.op_type == "MatMulNBits":
        block = f"8-bit activations in blocks of {attribute(node, 'block_size')}"
        return f"4-bit weights, {block if attribute(node, 'accuracy_level') == 4 else 'float32 activations'}"
    return INTEGERS if "Integer" in node.op_type else "float32"
