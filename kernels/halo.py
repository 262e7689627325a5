"""A linear can run its backward pass on 8-bit integers, as hardware does that fine-tunes in INT8 (HALO).

Source: arXiv 2501.02625. If a whole tensor has one scale, a few tokens with much larger gradients spoil the integers of
all. An orthogonal transform of the token axis spreads these over all tokens, and is undone exactly after the product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantize.kernels.hadamard import hadamard_factors, kronecker_transform
from quantize.kernels.reference import integer_matmul, round_to_grid, scale_and_zero_point


def linear_with_int8_backward(X: Tensor, W: Tensor, bias: Tensor | None, hadamard: bool) -> Tensor:
    """Compute `X Wᵀ + bias` in floating point, with a backward pass on integers.

    Args:
        X: [..., K].
        W: [N, K].
        bias: [N] or None.
        hadamard: whether the token axis, which is all axes of X but the last, is transformed first.

    Returns:
        [..., N].
    """
    return Int8Backward.apply(X, W, bias, hadamard)  # type: ignore[no-any-return,no-untyped-call]


def input_gradient(Ey: Tensor, W: Tensor, hadamard: bool) -> Tensor:
    """Return Eₓ = Hᵀ [Q(H E_y) Q(W)] with Q to int8 per tensor (HALO-2); without `hadamard`, Q(E_y) Q(W) (HALO-0).

    Args:
        Ey: the gradient of the output, [tokens, N].
        W: [N, K].
        hadamard: whether to transform the token axis, by an orthogonal H of any order.

    Returns:
        The gradient of the input, [tokens, K].
    """
    if not hadamard:
        return int8_product(Ey, W)
    a, b = (factor.to(Ey) for factor in hadamard_factors(len(Ey)))
    rotated = kronecker_transform(Ey.T, a.T, b.T).T
    return kronecker_transform(int8_product(rotated, W).T, a, b).T


def int8_product(A: Tensor, B: Tensor) -> Tensor:
    """Return Q(A) Q(B) for [M, L] and [L, N], summed exactly in integers, in the dtype of A."""
    (q_a, scale_a), (q_b, scale_b) = int8_per_tensor(A), int8_per_tensor(B)
    return integer_matmul(q_a, q_b.T).to(A) * scale_a * scale_b


def int8_per_tensor(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return symmetric int8 of the same shape, and one scale for all of it."""
    scale, zero_point = scale_and_zero_point(*x.aminmax(), 8, symmetric=True)
    return round_to_grid(x, scale, zero_point, 8).to(torch.int8), scale


class Int8Backward(torch.autograd.Function):
    """Y = X Wᵀ + b, Eₓ as in `input_gradient`, G_W = Q(E_yᵀ) Q(X)."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, W: Tensor, bias: Tensor | None, hadamard: bool) -> Tensor:
        """Map [..., K] to [..., N]."""
        ctx.save_for_backward(X, W)
        ctx.hadamard, ctx.has_bias = hadamard, bias is not None
        return torch.nn.functional.linear(X, W, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        """Return the gradients of X, W and bias."""
        X, W = ctx.saved_tensors
        Ey = gradients[0].reshape(-1, len(W))
        Ex = input_gradient(Ey, W, ctx.hadamard).reshape(X.shape)
        Gw = int8_product(Ey.T, X.reshape(-1, X.shape[-1]))
        return Ex, Gw, Ey.sum(0) if ctx.has_bias else None, None
