"""The precisions in which a file's products run are counted."""

from __future__ import annotations

from collections import Counter

import onnx_ir

from quantize.export.onnx.rewrites.matching import attribute, constant, made_by

CAST = "8-bit weights, float32 activations"
INTEGERS = "8-bit weights, 8-bit activations by token, 32-bit sums"  # values of 4 and 6 bits are held in 8 bits
PRODUCTS = ("MatMul", "Gemm", "FusedMatMul")


def precision_counts(model: onnx_ir.Model) -> dict[str, int]:
    """Return precision → number of products with weights that run in it, sorted."""
    found = Counter[str]()
    for node in model.graph:
        if takes_weights(node):
            found[precision(node)] += products_in(node)
    return dict(sorted(found.items()))


def takes_weights(node: onnx_ir.Node) -> bool:
    """Return whether a node is a product with a constant matrix."""
    if node.op_type not in PRODUCTS:
        return str(node.op_type).startswith(("MatMulNBits", "MatMulInteger", "QMoE"))
    # The exporter leaves the Transpose of a large table as it is, and the Cast of a large weight.
    made = made_by(node.inputs[1], "Transpose") or made_by(node.inputs[1], "Cast")
    return constant(node.inputs[1] if made is None else made.inputs[0]) is not None


def products_in(node: onnx_ir.Node) -> int:
    """Return how many products a node is: two for each expert of `QMoE`."""
    weights = node.inputs[2].shape if node.op_type == "QMoE" and node.inputs[2] is not None else None
    return 1 if weights is None else 2 * int(weights.numpy()[0])


def precision(node: onnx_ir.Node) -> str:
    """Describe the precision of a product in words."""
    if node.op_type in ("MatMulNBits", "QMoE"):
        block = f"8-bit activations in blocks of {attribute(node, 'block_size')}"
        return f"4-bit weights, {block if attribute(node, 'accuracy_level') == 4 else 'float32 activations'}"
    if "Integer" in node.op_type:
        return INTEGERS
    return CAST if made_by(node.inputs[1], "Cast") is not None else "float32"
