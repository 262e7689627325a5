"""8-bit integers, as ONNX Runtime's `MatMulIntegerToFloat` multiplies them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantize.kernels.reference import centred, integer_range
from quantize.linear import QuantizedLinear
from quantize.scheme import ActivationArgs

MIDDLE = 128  # uint8 that stands for the int8 0: signed activations take a 20 times slower kernel


class IntegerLinear(nn.Module):
    """int8 weights and per-token uint8 activations, multiplied in integers: `MatMulIntegerToFloat`, then x's scale.

    Equal to `kernels.reference.quantized_linear` up to the order of sums. More than one group turns into a batch of
    `MatMulInteger`, correct but several times slower than a single product. On x86 CPUs without VNNI instructions
    ONNX Runtime's kernel saturates at 16 bits in between, which 4-bit integers never reach and 8-bit ones may.

    Shapes: weight int8 [G, K/G, N], scale, shift float32 [G, 1, N], zero_point int8 [G, 1, N] or None; with one group
    [K, N] and [N]; bias [N] or None. `shift` is the scaled sum of a column, which a zero point of x takes off.
    Source: onnxruntime, docs/ContribOperators.md, com.microsoft.MatMulIntegerToFloat.
    """

    weight: Tensor
    scale: Tensor
    shift: Tensor
    zero_point: Tensor | None
    middle: Tensor
    one: Tensor
    bias: Tensor | None

    def __init__(self, layer: QuantizedLinear, activations: ActivationArgs) -> None:
        super().__init__()
        self.transform, self.activations, self.groups = layer.transform, activations, layer.scale.shape[1]
        q, zero_point, scale = layer.weight_integers(), layer.zero_point, layer.scale.float()
        sums = centred(q, zero_point).float().unflatten(1, (self.groups, -1)).sum(dim=-1)
        self.register_buffer("weight", self.columns_first(q))
        self.register_buffer("scale", self.each_column(scale))
        self.register_buffer("shift", self.each_column(sums * scale))
        self.register_buffer("zero_point", None if zero_point is None else self.each_column(zero_point))
        self.register_buffer("middle", torch.tensor(MIDDLE, dtype=torch.uint8))
        self.register_buffer("one", torch.tensor(1.0))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.float())

    def columns_first(self, matrix: Tensor) -> Tensor:
        """[N, G · c] → [G, c, N], or [c, N] if there is one group."""
        stacked = matrix.reshape(matrix.shape[0], self.groups, -1).permute(1, 2, 0).contiguous()
        return stacked if self.groups > 1 else stacked[0]

    def each_column(self, values: Tensor) -> Tensor:
        """[N, G] → [G, 1, N], or [N] if there is one group."""
        return self.columns_first(values) if self.groups > 1 else values[:, 0].contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        x = self.transform(x)
        scale, zero_point = self.grid(rows := x.reshape(-1, x.shape[-1]))
        q = self.quantize(rows, scale, zero_point)
        if self.groups > 1:
            q = q.unflatten(1, (self.groups, -1)).transpose(0, 1)
        y = self.product(q)
        if not self.activations.symmetric:
            y = y - zero_point[:, None] * self.shift
        y = (y.sum(dim=0) if self.groups > 1 else y) * scale[:, None]
        return (y if self.bias is None else y + self.bias).reshape(*x.shape[:-1], -1)

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[M, K] → scale and zero point [M], as `kernels.reference.scale_and_zero_point` in fewer operators."""
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
        """[M, K] on a grid for each row → uint8 [M, K] around `MIDDLE`, saturated: one `QuantizeLinear`."""
        middle = (zero_point + MIDDLE).to(torch.uint8)
        if torch.onnx.is_in_onnx_export():
            given = (x, scale, middle)
            q = torch.onnx.ops.symbolic("QuantizeLinear", given, {"axis": 0}, dtype=torch.uint8, shape=x.shape)
        else:
            q = ((x / scale[:, None]).round() + middle[:, None]).clamp(0, 255).to(torch.uint8)
        low, high = (MIDDLE + edge for edge in integer_range(self.activations.num_bits))
        return q if self.activations.num_bits == 8 else q.clamp(low, high)

    def product(self, q: Tensor) -> Tensor:
        """uint8 [M, K], or [G, M, c] in groups → float [..., M, N]: (q - MIDDLE) @ (weight - zero_point) · scale."""
        if not torch.onnx.is_in_onnx_export():
            weight = self.weight.double() if self.zero_point is None else self.weight.double() - self.zero_point
            return ((q.double() - MIDDLE) @ weight).float() * self.scale
        shape = (*q.shape[:-1], self.weight.shape[-1])
        if self.groups > 1:
            inputs = (q, self.weight, self.middle, self.zero_point)
            found = torch.onnx.ops.symbolic("MatMulInteger", inputs, dtype=torch.int32, shape=shape)
            return found.float() * self.scale
        operands = (q, self.weight, self.one, self.scale, self.middle, self.zero_point)
        name = "com.microsoft::MatMulIntegerToFloat"
        return torch.onnx.ops.symbolic(name, operands, dtype=torch.float32, shape=shape, version=1)


def safe(scale: Tensor) -> Tensor:
    """A row of zeros gets the scale 1."""
    return torch.where(scale > torch.finfo(scale.dtype).tiny, scale, 1.0)
