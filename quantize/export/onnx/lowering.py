"""Quantized linears in operators that ONNX Runtime has fast CPU kernels for.

Each module is both sides of an export: traced by `torch.onnx.export` it emits the ONNX operators, called in torch it
computes from the same buffers what ONNX Runtime computes, rounding included.
"""

from __future__ import annotations

from quantize.errors import UsageError
from quantize.export.onnx.matmul_integer import IntegerLinear
from quantize.export.onnx.matmul_nbits import BlockLinear
from quantize.formats import get_format
from quantize.nn.quantized_linear import QuantizedLinear

RUNNABLE = "W8A8, W6A6, W4A8, W4A4 and W4A16"


def lower(layer: QuantizedLinear) -> BlockLinear | IntegerLinear:
    """The same linear, float32 [..., K] → [..., N], made of the ONNX operators that are fast on few tokens.

    4-bit weights with float or 8-bit activations become `BlockLinear`, all other integer pairs `IntegerLinear`.

    Raises:
        UsageError: if ONNX Runtime has no kernel for the layer's scheme.
    """
    weights, activations = layer.scheme.weights, layer.scheme.activations
    if get_format(weights.format).element != "int":
        raise UsageError(
            f"ONNX Runtime's CPU kernels multiply no {weights.format} values; "
            f"quantize with one of {RUNNABLE} in integers"
        )
    if activations is not None and activations.runtime_smooth is not None:
        raise UsageError(
            "runtime smooth sorts channels anew for each batch, which no kernel of ONNX Runtime does; "
            "quantize without the pass `runtime_smooth`"
        )
    if weights.num_bits == 4 and (activations is None or activations.num_bits == 8):
        return BlockLinear(layer)
    if activations is None:
        raise UsageError(
            f"{weights.num_bits}-bit weights with floating-point activations have no fast kernel in ONNX Runtime; "
            f"quantize with one of {RUNNABLE}"
        )
    return IntegerLinear(layer, activations)


def lower_for_prefill(layer: QuantizedLinear) -> BlockLinear | IntegerLinear:
    """As `lower`, but W4A8 with one group becomes `IntegerLinear`: from 16 tokens on up to twice as fast, and exact.

    The weights take 8 bits in memory then.
    """
    lowered, activations = lower(layer), layer.scheme.activations
    if activations is not None and layer.scale.shape[1] == 1:
        return IntegerLinear(layer, activations)
    return lowered
