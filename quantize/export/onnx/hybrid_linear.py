"""A W4A8 linear can be stored twice: with 4-bit weights for the next token, and with 8-bit weights for a prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.export.onnx.lowered import LoweredLinear
from quantize.export.onnx.lowering import Lowered, lower, lower_for_prefill
from quantize.formats import get_format
from quantize.formats.qtensor import QTensor
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.scheme.scheme import Scheme, WeightArgs

MANY = 16  # tokens of all samples together from which 8-bit products are faster
LARGEST = 127  # for weights of 4 bits in groups; ±63 would move the output by a quarter more (books-llama-6m)


class HybridLinear(LoweredLinear):
    """Maps [..., K] to [..., N], for a `prompt` by `lower_for_prompt`, otherwise by `lower`.

    It takes three times the memory: a 4-bit weight is stored in 12 bits.
    """

    prompt = False

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__(layer)
        self.few, self.many = lower(layer), lower_for_prompt(layer)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., K] to [..., N]."""
        y: Tensor = self.many(x) if self.prompt else self.few(x)
        return y


def is_prompt(tokens: Tensor) -> bool:
    """Return whether tokens [batch, sequence] are many, or several of several samples, which take no cache in place."""
    return tokens.numel() >= MANY or tokens.numel() > max(tokens.shape)


def gains(layer: QuantizedLinear) -> bool:
    """Return whether the two lowerings of a linear differ, which is so for W4A8."""
    weights, activations = layer.scheme.weights, layer.scheme.activations
    integers = get_format(weights.format).element == "int"
    return integers and (weights.num_bits, activations and activations.num_bits) == (4, 8)


def lower_for_prompt(layer: QuantizedLinear) -> Lowered:
    """Lower as `lower_for_prefill`; for W4A8 in groups of columns the weights are first rounded anew by channel."""
    if layer.scale.shape[1] > 1 and gains(layer):
        return lower_for_prefill(by_channel(layer))
    return lower_for_prefill(layer)


def by_channel(layer: QuantizedLinear) -> QuantizedLinear:
    """Put the weights on one symmetric grid of ±`LARGEST` for each output channel, 18 times as fine as 4 bits."""
    weight, args = layer.qtensor().dequantize(), WeightArgs(num_bits=8, symmetric=True, group_size=0)
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / LARGEST
    scheme = Scheme(weights=args, activations=layer.scheme.activations)
    packed = QTensor.pack((weight / scale).round(), scale, None, args)
    return QuantizedLinear(packed, layer.bias, scheme, layer.online)
