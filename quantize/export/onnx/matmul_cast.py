"""8-bit weights with activations in floating point are multiplied in float32, from a file that holds the integers."""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.export.onnx.lowered import LoweredLinear
from quantize.nn.quantized_linear import QuantizedLinear


class CastLinear(LoweredLinear):
    """int8 weights with one scale for each row: Cast, MatMul and Mul.

    ONNX Runtime casts the weight once, when it opens the file, and then takes the time and the memory of a float32
    weight. It has an 8-bit `MatMulNBits`, too, but with float32 activations that takes 27 times as long for a token
    (49,152 × 576 on one core: 260 ms, where MatMul takes 9.6), and it is fast only where it rounds activations.

    Shapes: integers int8 [K, N], scale float32 [N], bias float32 [N] or None.
    """

    integers: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__(layer)
        self.transform = layer.transform
        self.register_buffer("integers", layer.weight_integers().T.contiguous())
        self.register_buffer("scale", layer.scale[:, 0].float())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.float())

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., K] to [..., N]."""
        y = torch.matmul(self.transform(x), self.integers.float()) * self.scale
        return y if self.bias is None else y + self.bias
