"""`make bench-gpu` compares our kernels, cuBLAS in bf16, torch's int8 product, and gemlite if it is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.gpu.case import Case, floats, integers
from benchmarks.gpu.experts import EXPERTS
from benchmarks.gpu.roofline import Product
from quantize.kernels import ops
from quantize.kernels.config import Config, architecture
from quantize.kernels.custom_ops import launch_gemm
from quantize.kernels.int4_mma import ARCHITECTURES as INT4_ARCHITECTURES
from quantize.kernels.int4_mma import as_signed, pack_signed
from quantize.kernels.packed import PackedWeight, QuantizedActivations
from quantize.kernels.prepack import exact_gemm

SMALLEST_INT_MM = 32  # torch._int_mm takes more than 16 tokens; smaller products are padded
GROUP = 128


@dataclass(frozen=True)
class Contender:
    """One way to multiply.

    Attributes:
        name: the name in the table.
        product: returns the product, with its bits, of a shape M, N, K.
        case: draws operands of a shape by a generator on their device.
        tolerance: the largest allowed relative distance from what is expected.
    """

    name: str
    product: Callable[[int, int, int], Product]
    case: Callable[[int, int, int, torch.Generator], Case]
    tolerance: float = 1e-2


def bf16_case(M: int, N: int, K: int, rng: torch.Generator) -> Case:
    """Use `torch.nn.functional.linear`, which calls cuBLAS."""
    x, weight = floats(M, K, rng=rng), floats(N, K, rng=rng)
    return Case(lambda: torch.nn.functional.linear(x, weight), lambda: x.double() @ weight.double().T)


def int8_case(M: int, N: int, K: int, rng: torch.Generator) -> Case:
    """Use `torch._int_mm`, which multiplies only the integers, without scales."""
    x = integers(max(M, SMALLEST_INT_MM), K, bits=8, rng=rng)
    weight = integers(N, K, bits=8, rng=rng).T
    return Case(lambda: torch._int_mm(x, weight), lambda: x.double() @ weight.double())


@dataclass(frozen=True)
class Ours:
    """A product of this project's kernels, with or without the quantizer of the activations.

    Attributes:
        weight_bits: 4 or 8.
        activation_bits: 4 or 8.
        group_size: the number of columns that share a scale of the weights; 0 means all.
        quantizes: whether each call also quantizes bf16 activations.
    """

    weight_bits: int
    activation_bits: int
    group_size: int = 0
    quantizes: bool = False

    def weight(self, N: int, K: int, rng: torch.Generator) -> PackedWeight:
        """Draw symmetric weights."""
        scale = torch.rand(N, K // (self.group_size or K), generator=rng, device=rng.device) + 0.5
        return ops.prepack(integers(N, K, bits=self.weight_bits, rng=rng), scale, None, self.weight_bits)

    def quantize(self, x: Tensor) -> QuantizedActivations:
        """Quantize activations asymmetrically."""
        layout = "pair" if self.activation_bits == 4 and not self.group_size else "int8"
        return ops.quantize_activations(x, self.activation_bits, False, 1.0, layout)

    def case(self, M: int, N: int, K: int, rng: torch.Generator) -> Case:
        """Return the product as it is served."""
        pw, x = self.weight(N, K, rng), floats(M, K, rng=rng)
        qa = self.quantize(x)
        return Case(
            lambda: ops.gemm(self.quantize(x) if self.quantizes else qa, pw, None, torch.bfloat16),
            lambda: exact_gemm(qa, pw, None, torch.float64),
        )

    def operands(self, M: int, N: int, K: int, rng: torch.Generator) -> tuple[QuantizedActivations, PackedWeight]:
        """Draw what a kernel multiplies, activations and weights."""
        pw = self.weight(N, K, rng)
        return self.quantize(floats(M, K, rng=rng)), pw

    def run(self, config: Config, operands: tuple[QuantizedActivations, PackedWeight]) -> Tensor:
        """Multiply by a given configuration."""
        return launch_gemm(*operands, None, torch.bfloat16, config)

    def expected(self, operands: tuple[QuantizedActivations, PackedWeight]) -> Tensor:
        """Multiply exactly."""
        return exact_gemm(*operands, None, torch.float64)

    def product(self, M: int, N: int, K: int) -> Product:
        """Return the product with the bits it moves; with the quantizer, activations are read in 16 bits."""
        return Product(M, N, K, self.weight_bits, 16 if self.quantizes else 8, 8, self.group_size)


@dataclass(frozen=True)
class WeightOnly:
    """Products of bf16 activations and integers of 4 bits with zero points in groups, as they are stored."""

    def operands(self, M: int, N: int, K: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw activations, packed integers, scales and zero points."""
        q, x = integers(N, K, bits=4, rng=rng), floats(M, K, rng=rng)
        scale = torch.rand(K // GROUP, N, generator=rng, device=rng.device) + 0.5
        return x, ops.pack_int4(q), scale, integers(K // GROUP, N, bits=4, rng=rng)

    def run(self, config: Config, operands: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """Multiply by a given configuration."""
        from quantize.kernels import weight_only_gemm

        return weight_only_gemm.launch(*operands, None, None, 4, config)

    def expected(self, operands: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """Multiply in float64."""
        x, data, scale, zero_point = operands
        W = ops.dequantize(ops.unpack_int4(data, x.shape[1]), scale.T, zero_point.T)
        return x.double() @ W.double().T

    def case(self, M: int, N: int, K: int, rng: torch.Generator) -> Case:
        """Return the product as it is served."""
        operands = self.operands(M, N, K, rng)
        return Case(lambda: ops.weight_only_linear(*operands, None, None, 4), lambda: self.expected(operands))

    def product(self, M: int, N: int, K: int) -> Product:
        """Return the product with the bits it moves."""
        return Product(M, N, K, 4, 16, 16, GROUP, scale_bytes=5)


NATIVE = Config(128, 128, 256, num_warps=8, num_stages=3, variant="native", asm=True)


@dataclass(frozen=True)
class Native:
    """W4A4 on int4 tensor cores, in one configuration."""

    config: Config = NATIVE

    def case(self, M: int, N: int, K: int, rng: torch.Generator) -> Case:
        """Return the case of `Ours(4, 4)` in another layout."""
        pw = Ours(4, 4).weight(N, K, rng)
        qa = ops.quantize_activations(floats(M, K, rng=rng), 4, False, 1.0, "int8")
        packed = replace(qa, q=pack_signed(qa.q), layout="s4")
        signed = as_signed(pw)
        return Case(
            lambda: launch_gemm(packed, signed, None, torch.bfloat16, self.config),
            lambda: exact_gemm(qa, pw, None, torch.float64),
        )


def gemlite_case(M: int, N: int, K: int, rng: torch.Generator) -> Case:
    """Use gemlite's W4A8, the nearest competitor in Triton; each call quantizes activations, to FP8 by default."""
    from gemlite.helper import A8W4_HQQ_INT_dynamic

    weight = integers(N, K, bits=4, rng=rng)
    scale = torch.rand(N, 1, generator=rng, device=rng.device).half() * 0.1 + 0.05
    x = floats(M, K, rng=rng, dtype=torch.float16)
    make = A8W4_HQQ_INT_dynamic(device=str(rng.device), dtype=torch.float16)
    linear = make.from_weights((weight + 8).to(torch.uint8), scale, torch.full_like(scale, 8))
    return Case(lambda: linear(x), lambda: x.double() @ (weight.double() * scale.double()).T)


def contenders(device: torch.device) -> Iterator[Contender]:
    """Yield the contenders on a device, in the order of the table."""
    yield Contender("bf16", Product, bf16_case)
    yield Contender("int8", lambda M, N, K: Product(max(M, SMALLEST_INT_MM), N, K, 8, 8, 8), int8_case, 0.0)
    for name, ours in OURS.items():
        yield Contender(name, ours.product, ours.case)
    yield Contender("W4A16 g128", WeightOnly().product, WeightOnly().case)
    for name, experts in EXPERTS.items():
        yield Contender(name, experts.product, experts.case)
    if architecture(device) in INT4_ARCHITECTURES:
        yield Contender("W4A4 int4", lambda M, N, K: Product(M, N, K, 4, 4, 4), Native().case)
    if find_spec("gemlite"):
        yield Contender("gemlite W4A8", Ours(4, 8, quantizes=True).product, gemlite_case, 5e-2)


OURS = {
    "W8A8": Ours(8, 8),
    "W4A8": Ours(4, 8),
    "W4A8 from bf16": Ours(4, 8, quantizes=True),
    "W4A8 g128": Ours(4, 8, GROUP),
    "W4A4": Ours(4, 4),
    "W4A4 from bf16": Ours(4, 4, quantizes=True),
}
