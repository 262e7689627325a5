"""The linear layer of a quantized model: online transforms, activation quantizer, integer product."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from quantize.formats.qtensor import QTensor
from quantize.kernels.ops import dequantize, quantized_linear, runtime_smooth_linear, unpack_int4
from quantize.leading import Leading
from quantize.online import Online
from quantize.rounding import fake_quantize
from quantize.scheme import Scheme


class QuantizedLinear(nn.Module):
    """Drop-in for `nn.Linear` that holds packed integers.

    Shapes as in `QTensor`; forward takes [..., K] and gives [..., N] in the input's dtype.

    Attributes:
        leading: the tokens in front of each sequence, whose activations are not quantized.
    """

    qweight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: QTensor, bias: Tensor | None, scheme: Scheme, online: Iterable[Online] = ()) -> None:
        super().__init__()
        self.scheme, self.in_features, self.out_features = scheme, weight.columns, weight.data.shape[0]
        for name, tensor in {"qweight": weight.data, "scale": weight.scale, "zero_point": weight.zero_point}.items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", bias)
        self.online = tuple(online)
        self.transform = nn.Sequential(*self.online)
        self.leading = Leading()

    def weight_integers(self) -> Tensor:
        """int8 [N, K]."""
        return unpack_int4(self.qweight, self.in_features) if self.scheme.weights.num_bits == 4 else self.qweight

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        return self.leading.apart(self.transform(x), self._exact, self._rounded)

    def _exact(self, x: Tensor) -> Tensor:
        """The product with activations as they are."""
        weight = dequantize(self.weight_integers(), self.scale, self.zero_point).to(x)
        return torch.nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x))

    def _rounded(self, x: Tensor) -> Tensor:
        """The product with activations quantized as the scheme says."""
        q, args = self.weight_integers(), self.scheme.activations
        if args is None:
            return self._exact(x)
        operands = (x, q, self.scale, self.zero_point, self.bias, args.num_bits, args.symmetric, args.clip_ratio)
        if smooth := args.runtime_smooth:
            return runtime_smooth_linear(*operands, smooth.group_size, smooth.normalize_tokens)
        return quantized_linear(*operands)

    def fake_quantized(self, x: Tensor) -> Tensor:
        """The same function in floating point: quantized and dequantized operands, a float product."""
        args = self.scheme.activations
        return self._exact(self.leading.apart(self.transform(x), lambda first: first, lambda x: fake_quantize(x, args)))
