"""The least time a product of matrices can take: by the bytes it moves and by the operations it does."""

from __future__ import annotations

from dataclasses import dataclass

OUTPUT_BYTES = 2  # bfloat16


@dataclass(frozen=True)
class Roof:
    """What a GPU can do at most.

    Attributes:
        bandwidth: of its memory, bytes/s.
        bf16: dense operations/s of its tensor cores, a multiplication and an addition being two.
        int8: the same with integers.
    """

    bandwidth: float
    bf16: float
    int8: float

    def peak(self, operand_bits: int) -> float:
        """Operations/s on operands so wide; int4 tensor cores, where there are some, do twice as many as int8 ones."""
        if operand_bits > 8:
            return self.bf16
        return self.int8 if operand_bits > 4 else 2 * self.int8


# Data sheets of the makers, dense, by the beginning of what the driver calls the card.
SPECIFIED = {
    "NVIDIA A100-SXM4-80GB": Roof(2.039e12, 312e12, 624e12),
    "NVIDIA H100 80GB HBM3": Roof(3.35e12, 989e12, 1979e12),
    "NVIDIA H200": Roof(4.8e12, 989e12, 1979e12),
    "NVIDIA L40S": Roof(0.864e12, 362e12, 733e12),
}


@dataclass(frozen=True)
class Product:
    """Y [M, N] = X [M, K] Wᵀ.

    Attributes:
        M: tokens.
        N: output channels.
        K: columns.
        weight_bits: as stored.
        activation_bits: as read.
        operand_bits: as multiplied.
        group_size: columns that share a scale of the weights; 0 means all.
        scale_bytes: of the scale of a group.
    """

    M: int
    N: int
    K: int
    weight_bits: int = 16
    activation_bits: int = 16
    operand_bits: int = 16
    group_size: int = 0
    scale_bytes: int = 1

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.M * self.N * self.K

    @property
    def bytes(self) -> float:
        """Weights, their groups' scales, activations and the result, each moved once."""
        scales = self.N * self.K / self.group_size * self.scale_bytes if self.group_size else 0
        stored = self.N * self.K * self.weight_bits / 8 + self.M * self.K * self.activation_bits / 8
        return stored + scales + self.M * self.N * OUTPUT_BYTES

    def floor(self, roof: Roof) -> float:
        """Microseconds below which no kernel can be."""
        return max(self.bytes / roof.bandwidth, self.operations / roof.peak(self.operand_bits)) * 1e6


def specified(gpu: str) -> Roof | None:
    """The data sheet's figures of a card, None for an unknown one."""
    return next((roof for name, roof in SPECIFIED.items() if gpu.startswith(name)), None)
