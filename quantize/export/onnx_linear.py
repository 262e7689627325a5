"""Quantized linears in operators that ONNX Runtime has fast CPU kernels for.

Each module is both sides of an export: traced by `torch.onnx.export` it emits the ONNX operators, called in torch it
computes from the same buffers what ONNX Runtime computes, rounding included.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantize.errors import UsageError
from quantize.kernels.ops import dequantize, pack_int4, unpack_int4
from quantize.kernels.reference import centred, round_to_grid, scale_and_zero_point
from quantize.linear import QuantizedLinear
from quantize.scheme import ActivationArgs

# ONNX Runtime also has blocks of 256; two of 128 with one scale are the same weights and a finer grid of activations.
BLOCK_SIZES = (128, 64, 32, 16)
RUNNABLE = "W8A8, W6A6, W4A8, W4A4 and W4A16"
SIGN_BITS = 0x88  # of a byte's two nibbles; flipping them turns two's complement q into unsigned q + 8 and back
MIDDLE = 128  # uint8 that stands for the int8 0: signed activations take a 20 times slower kernel


def lower(layer: QuantizedLinear) -> BlockLinear | IntegerLinear:
    """The same linear, float32 [..., K] → [..., N], made of ONNX operators.

    4-bit weights with float or 8-bit activations become `BlockLinear`, all other integer pairs `IntegerLinear`.

    Raises:
        UsageError: if ONNX Runtime has no kernel for the layer's scheme.
    """
    weights, activations = layer.scheme.weights, layer.scheme.activations
    if weights.format != "int":
        raise UsageError(
            f"ONNX Runtime's CPU kernels multiply no {weights.format} values; quantize with one of {RUNNABLE}"
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


class BlockLinear(nn.Module):
    """4-bit weights in blocks of columns: one `com.microsoft::MatMulNBits`.

    At 8-bit activations ONNX Runtime quantizes each row of x symmetrically block by block. That grid stands in for the
    scheme's grid per token and is at least as fine; the scheme's zero point and clipping do not apply to it.

    Shapes: packed uint8 [N, B, block / 2], scale float32 [N, B], zero_point uint8 [N, ⌈B/2⌉] or None, bias [N] or None.
    Source: onnxruntime, docs/ContribOperators.md, com.microsoft.MatMulNBits.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.transform, self.columns, self.rows = layer.transform, layer.in_features, layer.out_features
        self.quantizes_activations = layer.scheme.activations is not None
        self.block = block_size(layer.in_features, layer.scale.shape[1])
        blocks = -(-self.columns // self.block)
        q = nn.functional.pad(layer.weight_integers(), (0, blocks * self.block - self.columns))
        self.register_buffer("packed", (pack_int4(q) ^ SIGN_BITS).reshape(self.rows, blocks, self.block // 2))
        self.register_buffer("scale", per_block(layer.scale, blocks).float())
        zero_point = None if layer.zero_point is None else pack_int4(per_block(layer.zero_point, blocks)) ^ SIGN_BITS
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.float())

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        x = self.transform(x)
        if torch.onnx.is_in_onnx_export():
            return self.operator(x)
        x = int8_blocks(x, self.block) if self.quantizes_activations else x
        return nn.functional.linear(x, self.weight(), self.bias)

    def operator(self, x: Tensor) -> Tensor:
        """The ONNX node; accuracy level 4 takes activations to int8, level 0 leaves them in float32."""
        level = 4 if self.quantizes_activations else 0
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x, self.packed, self.scale, self.zero_point, None, self.bias),
            {"K": self.columns, "N": self.rows, "bits": 4, "block_size": self.block, "accuracy_level": level},
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.rows),
            version=1,
        )

    def weight(self) -> Tensor:
        """float32 [N, K], from the buffers of the operator."""
        blocks = self.packed.shape[1]
        q = unpack_int4(self.packed.flatten(1) ^ SIGN_BITS, blocks * self.block)
        zero_point = None if self.zero_point is None else unpack_int4(self.zero_point ^ SIGN_BITS, blocks)
        return dequantize(q, self.scale, zero_point)[:, : self.columns]


def block_size(columns: int, groups: int) -> int:
    """The largest of `BLOCK_SIZES` that fills a group; a single group is padded to whole blocks if none does."""
    group = columns // groups
    fitting = [block for block in BLOCK_SIZES if group % block == 0]
    if not fitting and groups > 1:
        raise UsageError(
            f"weight groups of {group} columns do not fit ONNX Runtime's 4-bit kernel, which takes multiples of 16; "
            "quantize with a group size of 16, 32, 64 or 128, or 0 for one scale for each output channel"
        )
    return fitting[0] if fitting else BLOCK_SIZES[-1]


def per_block(values: Tensor, blocks: int) -> Tensor:
    """[N, G] → [N, blocks]: each group's value for each of its blocks."""
    return values.repeat_interleave(blocks // values.shape[1], dim=1)


def int8_blocks(x: Tensor, block: int) -> Tensor:
    """Activations [..., K] on the int8 grids of ONNX Runtime's accuracy level 4, one for each `block` of columns."""
    columns = x.shape[-1]
    x = nn.functional.pad(x, (0, -columns % block))
    x = x.reshape(*x.shape[:-1], -1, block)
    largest = x.abs().amax(dim=-1, keepdim=True)
    steps = torch.where(largest > 0, 127 / largest, 0)  # times the reciprocal: a division would round other ties up
    return ((x * steps).round() * (largest / 127)).flatten(-2)[..., :columns]


class IntegerLinear(nn.Module):
    """int8 weights and per-token uint8 activations, multiplied in integers: `MatMulInteger`, then both scales.

    Equal to `kernels.reference.quantized_linear` up to the order in which groups are summed. More than one group turns
    into a batch of products, correct but several times slower than a single one. On x86 CPUs without VNNI instructions
    ONNX Runtime's kernel saturates at 16 bits in between, which 4-bit integers never reach and 8-bit ones may.

    Shapes: weight int8 [G, K/G, N], scale [G, 1, N], zero_point int8 [G, 1, N] or None, column_sums int32 [G, 1, N],
    all without the first axis if G is 1; bias [N] or None.
    """

    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    column_sums: Tensor
    middle: Tensor
    bias: Tensor | None

    def __init__(self, layer: QuantizedLinear, activations: ActivationArgs) -> None:
        super().__init__()
        self.transform, self.activations, self.groups = layer.transform, activations, layer.scale.shape[1]
        q, zero_point = layer.weight_integers(), layer.zero_point
        sums = self.columns_first(centred(q, zero_point).int()).sum(dim=-2, keepdim=True, dtype=torch.int32)
        self.register_buffer("weight", self.columns_first(q))
        self.register_buffer("scale", self.columns_first(layer.scale.float()))
        self.register_buffer("zero_point", None if zero_point is None else self.columns_first(zero_point))
        self.register_buffer("column_sums", sums)
        self.register_buffer("middle", torch.tensor(MIDDLE, dtype=torch.uint8))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.float())

    def columns_first(self, matrix: Tensor) -> Tensor:
        """[N, G · c] → [G, c, N], or [c, N] if there is one group."""
        stacked = matrix.reshape(matrix.shape[0], self.groups, -1).permute(1, 2, 0).contiguous()
        return stacked if self.groups > 1 else stacked[0]

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        x = self.transform(x)
        q, scale, zero_point = self.quantize(x)
        if self.groups == 1:
            y = self.product(q, zero_point)
        else:
            q = q.reshape(-1, self.groups, self.weight.shape[1]).transpose(0, 1)
            y = self.product(q, zero_point.reshape(-1, 1)).sum(dim=0).reshape(*x.shape[:-1], -1)
        return y * scale if self.bias is None else y * scale + self.bias

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., K] → uint8 [..., K] around `MIDDLE`, scale [..., 1], zero point int32 [..., 1], as the reference."""
        args = self.activations
        low, high = (edge * args.clip_ratio for edge in (x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)))
        scale, zero_point = scale_and_zero_point(low, high, args.num_bits, args.symmetric)
        q = round_to_grid(x, scale, zero_point, args.num_bits)
        return (q + MIDDLE).to(torch.uint8), scale, zero_point.to(torch.int32)

    def product(self, q: Tensor, zero_point: Tensor) -> Tensor:
        """uint8 [..., M, c] → [..., M, N], scaled but for x: Σ (q - z) w = Σ q w - z Σ w, as each row has its z."""
        return (self.matmul(q) - zero_point * self.column_sums).float() * self.scale

    def matmul(self, q: Tensor) -> Tensor:
        """uint8 [..., M, c] → int32 [..., M, N]: (q - MIDDLE) @ (weight - zero_point)."""
        if torch.onnx.is_in_onnx_export():
            inputs = (q, self.weight, self.middle, self.zero_point)
            shape = (*q.shape[:-1], self.weight.shape[-1])
            return torch.onnx.ops.symbolic("MatMulInteger", inputs, dtype=torch.int32, shape=shape)
        weight = self.weight.double() if self.zero_point is None else self.weight.double() - self.zero_point
        return ((q.double() - MIDDLE) @ weight).int()
