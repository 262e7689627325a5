"""It depends on the CPU whether 8-bit integers are multiplied exactly without session options."""

from __future__ import annotations

import functools

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

COLUMNS = 64


@functools.cache
def has_exact_int8_gemm() -> bool:
    """Return whether ONNX Runtime, without session options, sums the largest products of uint8 and int8 exactly.

    It does with VNNI or AMX instructions. There the option that makes other CPUs exact is not needed, and is expensive:
    products of weights of more than 7 bits took 13 times as long (128 tokens, 2048 × 2048, AMX).
    """
    weight = numpy_helper.from_array(np.full((COLUMNS, COLUMNS), 127, np.int8), "weight")
    kinds = {"x": TensorProto.UINT8, "y": TensorProto.INT32}
    x, y = (helper.make_tensor_value_info(name, kind, [1, COLUMNS]) for name, kind in kinds.items())
    node = helper.make_node("MatMulInteger", ["x", "weight"], ["y"])
    graph = helper.make_graph([node], "largest", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.full((1, COLUMNS), 255, np.uint8)})
    return bool((found == 255 * 127 * COLUMNS).all())
