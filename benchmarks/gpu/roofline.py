"""The roofline is the least time of a matrix product, by the bytes it moves and by the operations it does."""

from __future__ import annotations

from dataclasses import dataclass

OUTPUT_BYTES = 2  # bfloat16


@dataclass(frozen=True)
class Roof:
    """The best rates of a GPU.

    Attributes:
        bandwidth: the bandwidth of its memory, in bytes/s.
        bf16: dense operations/s of its tensor cores, where a multiplication and an addition are two operations.
        int8: the same for integers.
    """

    bandwidth: float
    bf16: float
    int8: float

    def peak(self, operand_bits: int) -> float:
        """Return operations/s on operands of so many bits; int4 tensor cores, if any, do twice as many as int8 ones."""
        if operand_bits > 8:
            return self.bf16
        return self.int8 if operand_bits > 4 else 2 * self.int8


# Dense rates of the makers' data sheets, by the beginning of the driver's name of the card.
SPECIFIED = {
    "NVIDIA A100-SXM4-80GB": Roof(2.039e12, 312e12, 624e12),
    "NVIDIA H100 80GB HBM3": Roof(3.35e12, 989e12, 1979e12),
    "NVIDIA H200": Roof(4.8e12, 989e12, 1979e12),
    "NVIDIA L40S": Roof(0.864e12, 362e12, 733e12),
}


@dataclass(frozen=True)
class Product:
    """The product Y [M, N] = X [M, K] Wᵀ.

    Attributes:
        M: the number of tokens.
        N: the number of output channels.
        K: the number of columns.
        weight_bits: the bits of a stored weight.
        activation_bits: the bits of an activation as it is read.
        operand_bits: the bits of the operands that are multiplied.
        group_size: the number of columns that share a scale of the weights; 0 means all.
        scale_bytes: the bytes of a group's scale.
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
        """The number of multiplications and additions."""
        return 2 * self.M * self.N * self.K

    @property
    def bytes(self) -> float:
        """The bytes of weights, their groups' scales, activations and the result, each moved once."""
        scales = self.N * self.K / self.group_size * self.scale_bytes if self.group_size else 0
        stored = self.N * self.K * self.weight_bits / 8 + self.M * self.K * self.activation_bits / 8
        return stored + scales + self.M * self.N * OUTPUT_BYTES

    def floor(self, roof: Roof) -> float:
        """Return the least microseconds that any kernel can take."""
        return max(self.bytes / roof.bandwidth, self.operations / roof.peak(self.operand_bits)) * 1e6


def specified(gpu: str) -> Roof | None:
    """Return the rates of a card's data sheet, or None for an unknown card."""
    return next((roof for name, roof in SPECIFIED.items() if gpu.startswith(name)), None)
