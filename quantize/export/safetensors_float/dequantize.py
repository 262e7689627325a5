"""A quantized linear as the plain linear that computes the same where activations are not rounded."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.functional import vjp

from quantize.nn.quantized_linear import QuantizedLinear


def float_linear(linear: QuantizedLinear) -> tuple[Tensor, Tensor | None]:
    """W [N, K] and bias [N] in float64; None where there is no bias and nothing to make up for.

    Online transforms take x to x T + n, so that (x T + n) Wᵀ + b = x (W Tᵀ)ᵀ + (n Wᵀ + b). W Tᵀ is the product of W
    with the Jacobian of x T + n, which is the same everywhere.
    """
    W, bias = linear.qtensor().dequantize().double(), None if linear.bias is None else linear.bias.double()
    if not linear.online:
        return W, bias
    if any(transform.has_shift for transform in linear.online):
        shift = linear.transform(torch.zeros(linear.in_features, dtype=torch.float64)) @ W.T
        bias = shift if bias is None else bias + shift
    return vjp(linear.transform, torch.zeros_like(W), W)[1], bias


def with_noise(linear: QuantizedLinear, relative: float) -> torch.nn.Linear:
    """`float_linear` in float32, each number off by up to `relative` of itself, always by the same."""
    plain = torch.nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
    generator = torch.Generator().manual_seed(0)
    for tensor, name in zip(float_linear(linear), ("weight", "bias"), strict=True):
        if tensor is not None:
            noise = torch.empty_like(tensor).uniform_(-relative, relative, generator=generator)
            setattr(plain, name, torch.nn.Parameter((tensor * (1 + noise)).float(), requires_grad=False))
    return plain
