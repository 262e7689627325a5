"""What a model may ask of a linear beside its product is the same once the linear is lowered."""

from __future__ import annotations

import torch
from torch import nn

from quantize.graph.weight_attributes import WeightAttributes
from quantize.nn.quantized_linear import QuantizedLinear


class LoweredLinear(nn.Module):
    """A linear, float32 [..., K] → [..., N], in the place of a quantized one."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features

    @property
    def weight(self) -> WeightAttributes:
        """The dtype, device and shape [N, K] of the weight: T5 asks for them before it calls a linear."""
        return WeightAttributes(torch.float32, torch.device("cpu"), (self.out_features, self.in_features))
