"""A quantized linear becomes a plain linear that computes the same if activations are not rounded."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.functional import vjp
from torch.func import functional_call

from quantize.nn.quantized_experts import QuantizedExperts
from quantize.nn.quantized_linear import QuantizedLinear


def float_linear(linear: QuantizedLinear) -> tuple[Tensor, Tensor | None]:
    """Return W [N, K] and the bias [N] in float64; the bias is None if there is none and nothing to compensate.

    Online transforms map x to x T + n, so (x T + n) Wᵀ + b = x (W Tᵀ)ᵀ + (n Wᵀ + b). W Tᵀ is the product of W with the
    Jacobian of x T + n, which is the same everywhere.
    """
    W, bias = linear.qtensor().dequantize().double(), None if linear.bias is None else linear.bias.double()
    if not linear.online:
        return W, bias
    if any(transform.has_shift for transform in linear.online):
        shift = linear.transform(torch.zeros(linear.in_features, dtype=torch.float64)) @ W.T
        bias = shift if bias is None else bias + shift
    return vjp(linear.transform, torch.zeros_like(W), W)[1], bias


def float_stack(experts: QuantizedExperts, dtype: torch.dtype) -> Tensor:
    """Return the stack [E, N, K], or [E, K, N], in `dtype`, with the online transforms in the weights; no bias is left.

    The model adds the experts' own biases, so that the bias of a stack only undoes a shift of its inputs.
    """
    W = torch.stack([float_linear(experts.expert(e))[0].to(dtype) for e in range(experts.count)])
    return W.mT.contiguous() if experts.transposed else W


def with_noise(linear: QuantizedLinear, relative: float) -> nn.Linear:
    """Return `float_linear` in float32 with relative errors of up to `relative`, the same ones in each call."""
    plain = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
    generator = torch.Generator().manual_seed(0)
    for tensor, name in zip(float_linear(linear), ("weight", "bias"), strict=True):
        if tensor is not None:
            noisy = tensor * (1 + noise_like(tensor, relative, generator))
            setattr(plain, name, nn.Parameter(noisy.float(), requires_grad=False))
    return plain


def stack_with_noise(experts: QuantizedExperts, relative: float) -> nn.Parameter:
    """Return `float_stack` in float32 with relative errors of up to `relative`, the same ones in each call."""
    W = float_stack(experts, torch.float32)
    W *= 1 + noise_like(W, relative, torch.Generator().manual_seed(0))
    return nn.Parameter(W, requires_grad=False)


def noise_like(tensor: Tensor, largest: float, generator: torch.Generator) -> Tensor:
    """Return uniform noise of up to `largest` in the shape and type of a tensor."""
    return torch.empty_like(tensor).uniform_(-largest, largest, generator=generator)


def is_transposed(module: nn.Module, columns: int) -> bool | None:
    """Return whether a float model's module for x Wᵀ, W [N, K], holds W as [K, N]; None if it is no such module.

    A module that is no `nn.Linear` is tried with a W of one entry, while everything else that it holds is zero.
    """
    held = dict(module.named_parameters(recurse=False))
    if isinstance(module, nn.Linear) or "weight" not in held or held["weight"].dim() != 2:
        return False if isinstance(module, nn.Linear) else None
    zeros, shape, x = (
        {name: torch.zeros(p.shape) for name, p in held.items()},
        held["weight"].shape,
        torch.ones(columns),
    )
    x[-1], W = 2, torch.zeros(shape.numel() // columns, columns)
    W[0, -1] = 1
    for weight, transposed in ((W, False), (W.T, True)):
        try:
            y = functional_call(module, zeros | {"weight": weight}, (x[None],))
        except Exception:  # any error of unknown code
            continue
        if weight.shape == shape and isinstance(y, Tensor) and torch.equal(y, (x @ W.T)[None]):
            return transposed
    return None
