"""A mixture of experts does the work of one dense product, on the weights of all experts that its tokens chose."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.gpu.case import Case, floats, integers
from benchmarks.gpu.roofline import OUTPUT_BYTES, Product
from quantize.kernels import ops
from quantize.kernels.prepack import exact_expert_gemm


@dataclass(frozen=True)
class ExpertsProduct(Product):
    """The product of M tokens, each with `top` of `experts` experts of N / top channels: as many operations as dense.

    Attributes:
        experts, top: the number of experts, and of those that a token chooses.
    """

    experts: int = 1
    top: int = 1

    @property
    def bytes(self) -> float:
        """The bytes of the experts that can be chosen, of the sorted activations and of the result."""
        read = min(self.experts, self.M * self.top) * (self.N // self.top) * self.K * self.weight_bits / 8
        return read + self.M * self.top * self.K * self.activation_bits / 8 + self.M * self.N * OUTPUT_BYTES


@dataclass(frozen=True)
class Experts:
    """W4A8 with one scale a channel, tokens routed evenly at random.

    Attributes:
        experts, top: as in `ExpertsProduct`.
    """

    experts: int
    top: int

    def product(self, M: int, N: int, K: int) -> ExpertsProduct:
        """Return the product with the bits it moves."""
        return ExpertsProduct(M, N, K, 4, 8, 8, experts=self.experts, top=self.top)

    def case(self, M: int, N: int, K: int, rng: torch.Generator) -> Case:
        """Return the product as it is served, without the quantizer."""
        channels = self.experts * (N // self.top)
        scale = torch.rand(channels, 1, generator=rng, device=rng.device) + 0.5
        pw = ops.prepack(integers(channels, K, bits=4, rng=rng), scale, None, 4)
        qa = ops.quantize_activations(floats(M * self.top, K, rng=rng), 8, False, 1.0)
        chosen = torch.randint(self.experts, (M * self.top,), generator=rng, device=rng.device)
        ends = torch.bincount(chosen, minlength=self.experts).cumsum(0).int()
        return Case(
            lambda: ops.expert_gemm(qa, pw, ends, None, torch.bfloat16),
            lambda: exact_expert_gemm(qa, pw, ends, None, torch.float64),
        )


EXPERTS = {"W4A8, 2 of 8 experts": Experts(8, 2), "W4A8, 8 of 128 experts": Experts(128, 8)}
