"""Integers are multiplied in 8 bits by ONNX Runtime's `MatMulIntegerToFloat`."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from quantize.export.onnx.lowered import LoweredLinear
from quantize.kernels.reference import centred, integer_range
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.scheme.scheme import ActivationArgs

MIDDLE = 128  # the uint8 that stands for the int8 0; signed activations would run in a 20 times slower kernel


class IntegerLinear(LoweredLinear):
    """int8 weights and uint8 activations by token are multiplied by `MatMulIntegerToFloat`, then scaled by x's scale.

    The result equals `kernels.reference.quantized_linear` up to the order of sums. Each of several groups has its own
    product, which is added to the ones before. This was the fastest exact form that was measured, 1.6 to 4 times as
    fast as a batch of products and a sum over it (1 to 512 tokens, 2048 × 2048, 16 groups). On x86 CPUs without VNNI
    instructions ONNX Runtime's kernel saturates intermediate sums at 16 bits, which 4-bit integers never reach, but
    8-bit integers may.

    Shapes: shift and bias float32 [N]; bias may be None. `shift` is the scaled sum of a column, which is subtracted
        once
    for each unit of x's zero point.
    """

    shift: Tensor
    middle: Tensor
    one: Tensor
    bias: Tensor | None

    def __init__(self, layer: QuantizedLinear, activations: ActivationArgs) -> None:
        super().__init__(layer)
        self.transform, self.activations, groups = layer.transform, activations, layer.scale.shape[1]
        self.columns = layer.in_features // groups
        q, zero_point, scale = layer.weight_integers().split(self.columns, dim=1), layer.zero_point, layer.scale.float()
        zero_points = [None] * groups if zero_point is None else [zero_point[:, g] for g in range(groups)]
        self.groups = nn.ModuleList(map(ScaleGroup, q, zero_points, scale.unbind(dim=1)))
        sums = centred(layer.weight_integers(), zero_point).float().unflatten(1, (groups, -1)).sum(dim=-1)
        self.register_buffer("shift", (sums * scale).sum(dim=1))
        self.register_buffer("middle", torch.tensor(MIDDLE, dtype=torch.uint8))
        self.register_buffer("one", torch.tensor(1.0))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.float())

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., K] to [..., N]."""
        x = self.transform(x)
        scale, zero_point = self.grid(rows := x.reshape(-1, x.shape[-1]))
        y = self.product(self.quantize(rows, scale, zero_point))
        if not self.activations.symmetric:
            y = y - zero_point[:, None] * self.shift
        y = y * scale[:, None]
        return (y if self.bias is None else y + self.bias).reshape(*x.shape[:-1], y.shape[-1])

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute `kernels.reference.scale_and_zero_point` in fewer operators: [M, K] → scale and zero point [M]."""
        args = self.activations
        low, high = integer_range(args.num_bits)
        if args.symmetric:
            scale = safe(x.abs().amax(dim=-1) * args.clip_ratio / high)
            return scale, torch.zeros_like(scale)
        least = x.amin(dim=-1).clamp(max=0) * args.clip_ratio
        most = x.amax(dim=-1).clamp(min=0) * args.clip_ratio
        scale = safe((most - least) / (high - low))
        return scale, (low - least / scale).round()

    def quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Map [M, K] on a grid for each row to uint8 [M, K] around `MIDDLE`, saturated, by one `QuantizeLinear`."""
        middle = (zero_point + MIDDLE).to(torch.uint8)
        if torch.onnx.is_in_onnx_export():
            given = (x, scale, middle)
            q = torch.onnx.ops.symbolic("QuantizeLinear", given, {"axis": 0}, dtype=torch.uint8, shape=x.shape)
        else:
            q = ((x / scale[:, None]).round() + middle[:, None]).clamp(0, 255).to(torch.uint8)
        low, high = (MIDDLE + edge for edge in integer_range(self.activations.num_bits))
        return q if self.activations.num_bits == 8 else q.clamp(low, high)

    def product(self, q: Tensor) -> Tensor:
        """Map uint8 [M, K] to float [M, N]: (q - MIDDLE) @ (weight - zero_point) · scale."""
        parts = q.split(self.columns, dim=-1) if len(self.groups) > 1 else [q]
        products = (group(part, self.one, self.middle) for group, part in zip(self.groups, parts, strict=True))
        found: Tensor = functools.reduce(torch.add, products)
        return found


class ScaleGroup(nn.Module):
    """Columns that share a scale for each row: one `com.microsoft::MatMulIntegerToFloat`.

    Shapes: weight int8 [c, N], scale float32 [N], zero_point int8 [N] or None.
    Source: onnxruntime, docs/ContribOperators.md, com.microsoft.MatMulIntegerToFloat.
    """

    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, q: Tensor, zero_point: Tensor | None, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", q.T.contiguous())
        self.register_buffer("scale", scale.contiguous())
        self.register_buffer("zero_point", None if zero_point is None else zero_point.contiguous())

    def forward(self, q: Tensor, one: Tensor, middle: Tensor) -> Tensor:
        """Map uint8 [M, c] to float [M, N]."""
        if not torch.onnx.is_in_onnx_export():
            weight = self.weight.double() if self.zero_point is None else self.weight.double() - self.zero_point
            return ((q.double() - MIDDLE) @ weight).float() * self.scale
        operands = (q, self.weight, one, self.scale, middle, self.zero_point)
        name, shape = "com.microsoft::MatMulIntegerToFloat", (q.shape[0], self.weight.shape[-1])
        return torch.onnx.ops.symbolic(name, operands, dtype=torch.float32, shape=shape, version=1)


def safe(scale: Tensor) -> Tensor:
    """Replace the scale of a row of zeros by 1."""
    return torch.where(scale > torch.finfo(scale.dtype).tiny, scale, 1.0)
