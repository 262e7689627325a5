"""The linear layer of a quantized model: online transform, activation quantizer, integer product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantize.formats.qtensor import QTensor
from quantize.kernels.hadamard import hadamard_factors, kronecker_transform
from quantize.kernels.ops import dequantize, quantize_activations, quantized_linear
from quantize.scheme import ActivationArgs, Scheme


@dataclass(frozen=True)
class OnlineHadamard:
    """`x @ (H ⊗ I_stride)` in front of a linear, H orthogonal of order `size`; see `kernels/hadamard.py`."""

    size: int
    stride: int = 1


class HadamardTransform(nn.Module):
    """An `OnlineHadamard` with its two Kronecker factors as buffers, which are never saved."""

    a: Tensor
    b: Tensor

    def __init__(self, online: OnlineHadamard) -> None:
        super().__init__()
        self.online = online
        a, b = hadamard_factors(online.size)
        self.register_buffer("a", a.float(), persistent=False)
        self.register_buffer("b", b.float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., K]."""
        return kronecker_transform(x, self.a.to(x), self.b.to(x), self.online.stride)


class QuantizedLinear(nn.Module):
    """Drop-in for `nn.Linear` that holds packed integers.

    Shapes as in `QTensor`; forward takes [..., K] and gives [..., N] in the input's dtype.
    """

    qweight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    unit: Tensor | None
    bias: Tensor | None

    def __init__(
        self, weight: QTensor, bias: Tensor | None, scheme: Scheme, online: OnlineHadamard | None = None
    ) -> None:
        super().__init__()
        self.scheme, self.in_features, self.out_features = scheme, weight.columns, weight.data.shape[0]
        stored = {"qweight": weight.data, "scale": weight.scale, "zero_point": weight.zero_point, "unit": weight.unit}
        for name, tensor in stored.items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", bias)
        self.transform = HadamardTransform(online) if online else nn.Identity()

    def weight_integers(self) -> Tensor:
        """int8 [N, K]."""
        return self.weight().unpack()

    def weight(self) -> QTensor:
        """The buffers as they are now, in one piece."""
        args = self.scheme.weights
        return QTensor(self.qweight, self.scale, self.zero_point, self.in_features, args, self.unit)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        x, weight, activations = self.transform(x), self.weight(), self.scheme.activations
        if activations is None:
            bias = None if self.bias is None else self.bias.to(x)
            return torch.nn.functional.linear(x, weight.dequantize().to(x), bias)
        return quantized_linear(
            x, weight.unpack(), weight.unpack_scale(), self.zero_point, self.bias, *quantizer_arguments(activations)
        )

    def fake_quantized(self, x: Tensor) -> Tensor:
        """The same function in floating point: quantized and dequantized operands, a float product."""
        x, activations = self.transform(x), self.scheme.activations
        if activations is not None:
            x = dequantize(*quantize_activations(x, *quantizer_arguments(activations))).to(x)
        return torch.nn.functional.linear(x, self.weight().dequantize().to(x), self.bias)


def quantizer_arguments(args: ActivationArgs) -> tuple[int, bool, float, str, int]:
    """What the kernels take: bits, symmetric, clip ratio, format, group size."""
    return args.num_bits, args.symmetric, args.clip_ratio, args.format, args.group_size
