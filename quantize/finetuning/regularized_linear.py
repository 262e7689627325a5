"""While a model is fine-tuned, its linears read few levels, and heavy tails of their outputs are penalized."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from quantize.kernels.ops import linear_with_int8_backward
from quantize.nn.interruptible import interruptible
from quantize.transforms.kurtosis import kurtosis

Backward = Literal["none", "int8", "int8_hadamard"]

RATIOS = torch.linspace(0.05, 1, 20)


def learned_clip(x: Tensor, clip: Tensor, num_bits: int) -> Tensor:
    """Round x to the nearest of 2^b levels spread evenly over [c-, c+] (arXiv 2404.03605, section 4; PACT, LSQ).

    With s = (c+ - c-) / (2^b - 1) and u = (x - c-) / s the gradients are straight-through. That of x is 1 inside the
    range and 0 outside. That of c+ is 1 above the range and (round(u) - u) / (2^b - 1) inside; that of c- is 1 below
    the range and minus the same inside.

    Args:
        x: any shape.
        clip: [c-, c+], c- < c+.
        num_bits: b.
    """
    c_minus, c_plus = clip.unbind()
    s: Tensor = (c_plus - c_minus) / (2**num_bits - 1)
    u = (torch.minimum(torch.maximum(x, c_minus), c_plus) - c_minus) / s
    straight_through: Tensor = u + (u.round() - u).detach()
    return straight_through * s + c_minus


def best_clip(x: Tensor, num_bits: int) -> Tensor:
    """Return [c-, c+], the part of the range of x (with zero) whose levels are nearest to x in mean square."""
    clips = torch.stack([x.min().clamp(max=0), x.max().clamp(min=0)]) * RATIOS.to(x)[:, None]
    errors = [(learned_clip(x, clip, num_bits) - x).square().mean() for clip in clips]
    return clips[torch.stack(errors).argmin()]


class RegularizedLinear(nn.Module):
    """A stand-in for a linear, with the same parameters, that notes the kurtosis of its outputs.

    Attributes:
        clip: [c-, c+], which is learned and set by the first input.
        output_kurtosis: the mean kurtosis of each output since the list was cleared, as scalars.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, transposed: bool, num_bits: int, backward: Backward
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.transposed = weight, bias, transposed
        self.num_bits, self.backward = num_bits, backward
        self.clip = nn.Parameter(torch.tensor([-3.0, 4.0]))  # the authors start it so
        self.started = False
        self.output_kurtosis: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        if not self.started and x.numel():
            self.start(x.detach())
        y = interruptible(self.product(learned_clip(x, self.clip, self.num_bits)))
        if y.numel():
            self.output_kurtosis.append(kurtosis(y).mean())
        return y

    def start(self, x: Tensor) -> None:
        """Set the clip by an input, unless the input is all zero."""
        clip = best_clip(x, self.num_bits)
        if clip[0] < clip[1]:
            self.clip.data.copy_(clip)
            self.started = True

    def product(self, x: Tensor) -> Tensor:
        """`x Wᵀ + bias`."""
        W = self.weight.T if self.transposed else self.weight
        if self.backward == "none":
            return nn.functional.linear(x, W, self.bias)
        return linear_with_int8_backward(x, W, self.bias, self.backward == "int8_hadamard")
