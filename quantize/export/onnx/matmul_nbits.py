"""Weights of 3 or 4 bits in blocks are multiplied by ONNX Runtime's `MatMulNBits`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantize.errors import UsageError
from quantize.export.base import Obstacle
from quantize.export.onnx.lowered import LoweredLinear
from quantize.kernels.ops import dequantize, pack_int4, unpack_int4
from quantize.nn.quantized_linear import QuantizedLinear

# ONNX Runtime also has blocks of 256. Two of 128 with one scale are the same weights with a finer activation grid.
BLOCK_SIZES = (128, 64, 32, 16)
OFFSET = 8  # of unsigned values
SIGN_BITS = 0x88  # of a byte's two nibbles; flipping them turns two's complement q into unsigned q + 8 and back


class BlockLinear(LoweredLinear):
    """Weights of at most 4 bits in blocks of columns: one `com.microsoft::MatMulNBits` of 4 bits.

    With 8-bit activations ONNX Runtime quantizes each row of x symmetrically block by block. That grid replaces the
    scheme's grid by token and is at least as fine; the scheme's zero point and clipping do not apply to it.

    Shapes: packed uint8 [N, B, block / 2], scale float32 [N, B], bias [N] or None, zero_point uint8 [N, ⌈B/2⌉], for
    zero points that are no integers float32 [N, B], or None; those of the operator are of unsigned values q + 8.

    Args:
        layer: the linear.
        block: columns of a block, which divide its groups; None takes the largest of `BLOCK_SIZES` that do.
    Source: onnxruntime, docs/ContribOperators.md, com.microsoft.MatMulNBits.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: QuantizedLinear, block: int | None = None) -> None:
        super().__init__(layer)
        self.transform = layer.transform
        self.quantizes_activations = layer.scheme.activations is not None
        self.block = block or block_size(layer.in_features, layer.scale.shape[1])
        blocks = -(-self.in_features // self.block)
        q = nn.functional.pad(layer.weight_integers(), (0, blocks * self.block - self.in_features))
        self.register_buffer("packed", (pack_int4(q) ^ SIGN_BITS).reshape(self.out_features, blocks, self.block // 2))
        self.register_buffer("scale", per_block(layer.scale, blocks).float())
        zero_point = None if layer.zero_point is None else per_block(layer.zero_point, blocks)
        if zero_point is not None:
            floats = zero_point.is_floating_point()
            zero_point = zero_point.float() + OFFSET if floats else pack_int4(zero_point) ^ SIGN_BITS
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.float())

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., K] to [..., N]."""
        x = self.transform(x)
        if torch.onnx.is_in_onnx_export():
            return self.operator(x)
        x = int8_blocks(x, self.block) if self.quantizes_activations else x
        return nn.functional.linear(x, self.dequantized(), self.bias)

    def operator(self, x: Tensor) -> Tensor:
        """Emit the ONNX node; accuracy level 4 quantizes activations to int8, and level 0 leaves them in float32."""
        level = 4 if self.quantizes_activations else 0
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x, self.packed, self.scale, self.zero_point, None, self.bias),
            {
                "K": self.in_features,
                "N": self.out_features,
                "bits": 4,
                "block_size": self.block,
                "accuracy_level": level,
            },
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=1,
        )

    def dequantized(self) -> Tensor:
        """Return float32 [N, K], from the buffers of the operator."""
        return dequantized_blocks(self.packed.flatten(1), self.scale, self.zero_point)[:, : self.in_features]


def dequantized_blocks(packed: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Return float32 [N, K] of `BlockLinear`'s buffers, `packed` as uint8 [N, K / 2]."""
    q = unpack_int4(packed ^ SIGN_BITS, 2 * packed.shape[1])
    if zero_point is not None:
        floats = zero_point.is_floating_point()
        zero_point = zero_point - OFFSET if floats else unpack_int4(zero_point ^ SIGN_BITS, scale.shape[1])
    return dequantize(q, scale, zero_point)


def block_size(columns: int, groups: int) -> int:
    """Return the largest of `BLOCK_SIZES` that divides a group; if none does, a single group is padded to blocks."""
    group = columns // groups
    if obstacle := odd_groups(columns, group):
        raise UsageError(str(obstacle))
    return next((block for block in BLOCK_SIZES if group % block == 0), BLOCK_SIZES[-1])


def odd_groups(columns: int, group_size: int) -> Obstacle | None:
    """Return why groups of columns cannot be made of blocks, or None if they can; 0 is a single group."""
    if group_size in (0, columns) or any(group_size % block == 0 for block in BLOCK_SIZES):
        return None
    return Obstacle(
        f"weight groups of {group_size} columns do not fit ONNX Runtime's 4-bit kernel, which takes multiples of 16",
        "quantize with a group size of 16, 32, 64 or 128, or 0 for one scale for each output channel",
    )


def per_block(values: Tensor, blocks: int) -> Tensor:
    """Map [N, G] to [N, blocks]: each block gets the value of its group."""
    return values.repeat_interleave(blocks // values.shape[1], dim=1)


def int8_blocks(x: Tensor, block: int) -> Tensor:
    """Put activations [..., K] on the int8 grids of ONNX Runtime's accuracy level 4, one for each block of columns."""
    columns = x.shape[-1]
    x = nn.functional.pad(x, (0, -columns % block))
    x = x.unflatten(-1, (x.shape[-1] // block, block))  # of no rows, too
    largest = x.abs().amax(dim=-1, keepdim=True)
    steps = torch.where(largest > 0, 127 / largest, 0)  # times the reciprocal; a division would round other ties up
    return ((x * steps).round() * (largest / 127)).flatten(-2)[..., :columns]
