"""Linears use standard ONNX operators alone, for runtimes other than ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassResult

from quantize.export.onnx.rewrites.matching import attribute, constant, initializer, replace, rewritten_any


class StandardLinears(InPlacePass):  # type: ignore[misc]
    """MatMulNBits → DequantizeLinear of INT4, MatMul, Add; MatMulIntegerToFloat → MatMulInteger, Cast, Mul.

    Weights are stored as [columns, rows] with blocks along axis 0: from this layout, and from no other, ONNX Runtime
    makes one MatMulNBits again. Activations that MatMulNBits would quantize are floating point in such a file.

    Source: ONNX operators, DequantizeLinear-23.
    """

    def call(self, model: onnx_ir.Model) -> PassResult:
        """Rewrite all linears."""
        done = [
            rewritten_any(model, "MatMulNBits", dequantized),
            rewritten_any(model, "MatMulIntegerToFloat", integers),
        ]
        return PassResult(model, any(result.modified for result in done))


def dequantized(graph: onnx_ir.Graph, node: onnx_ir.Node) -> bool:
    """Rewrite one linear with 4-bit weights."""
    x, weight, scale, zero_point, _, bias = padded(node.inputs)
    columns, (rows, blocks, _) = int(attribute(node, "K")), weight.shape
    scales = np.ascontiguousarray(constant_array(scale).reshape(rows, blocks).T)
    operands = [int4(graph, weight, rows, columns), initializer(graph, f"{scale.name}.blocks", scales)]
    if zero_point is not None:
        operands.append(int4(graph, zero_point, rows, blocks))
    blocked = {"axis": 0, "block_size": attribute(node, "block_size")}
    new = [onnx_ir.node("DequantizeLinear", operands, blocked)]
    matrix = new[0].outputs[0]
    if flat := x.shape is not None and len(x.shape) == 2:  # otherwise a bias and Relu become a FusedGemm, with floats
        first = graph.initializers.get("first_axis") or initializer(graph, "first_axis", np.array([0]))
        new.append(onnx_ir.node("Unsqueeze", [x, first]))
        x = new[-1].outputs[0]
    new.append(onnx_ir.node("MatMul", [x, matrix]))
    if bias is not None:
        new.append(onnx_ir.node("Add", [new[-1].outputs[0], bias]))
    if flat:
        new.append(onnx_ir.node("Squeeze", [new[-1].outputs[0], first]))
    replace(graph, node, new, {node.outputs[0]: new[-1].outputs[0]})
    return True


def padded(inputs: Sequence[onnx_ir.Value | None]) -> list[Any]:
    """Return all six inputs of MatMulNBits."""
    return [*inputs, *[None] * (6 - len(inputs))]


def constant_array(value: onnx_ir.Value) -> NDArray[Any]:
    """Return the array of an initializer."""
    found = constant(value)
    assert found is not None  # weights are constants, as `BlockLinear` makes them
    return found


def int4(graph: onnx_ir.Graph, value: onnx_ir.Value, rows: int, columns: int) -> onnx_ir.Value:
    """Turn packed uint8 [rows, ...] with zero at 8 into an initializer INT4 [columns, rows] without the padding."""
    packed = constant_array(value).reshape(rows, -1)
    apart = np.stack([packed & 15, packed >> 4], axis=-1).reshape(rows, -1).astype(np.int8) - 8
    array = np.ascontiguousarray(apart[:, :columns].T).astype(ml_dtypes.int4)
    return initializer(graph, f"{value.name}.int4", array)


def integers(graph: onnx_ir.Graph, node: onnx_ir.Node) -> bool:
    """Rewrite one linear with 8-bit weights."""
    q, weight, _, scale, middle, *zero_point = node.inputs
    product = onnx_ir.node("MatMulInteger", [q, weight, middle, *zero_point[:1]])
    cast = onnx_ir.node("Cast", [product.outputs[0]], {"to": onnx_ir.DataType.FLOAT})
    scaled = onnx_ir.node("Mul", [cast.outputs[0], scale])
    replace(graph, node, [product, cast, scaled], {node.outputs[0]: scaled.outputs[0]})
    return True
