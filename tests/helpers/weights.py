"""Random weights, inputs as correlated as activations are, and the rounding error on them are for tests."""

import torch

from quantize.calibration.statistics import Gram


def correlated(tokens=512, columns=64, seed=0):
    """Return inputs with a decaying spectrum, as activations have."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=rng) * torch.logspace(0, -2, columns)
    return torch.randn(tokens, columns, generator=rng) @ mix


def gram_of(X):
    gram = Gram()
    gram.update(X)
    return gram


def weights(rows=32, columns=64, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def output_error(W, quantized, X):
    return float((X @ (W - quantized.dequantize()).T).square().mean() / (X @ W.T).square().mean())


def rounded_to_q4_0(W: torch.Tensor) -> torch.Tensor:
    """Round as llama.cpp's Q4_0: groups of 32 on d · {-8 … 7}, where d is the weight of largest magnitude over -8."""
    groups = W.float().reshape(-1, 32)
    d = (groups.gather(1, groups.abs().argmax(1, keepdim=True)) / -8).half().float()
    q = (groups / torch.where(d == 0, 1, d) + 8.5).floor().clamp(0, 15) - 8
    return (q * d).view_as(W)


def rounded_to_levels(W: torch.Tensor, levels: int) -> torch.Tensor:
    """Round each row to so many equally spaced levels, symmetric around 0 if their number is odd."""
    d = W.abs().amax(1, keepdim=True) / (levels // 2)
    return (W / d).round().clamp(levels // 2 - levels + 1, levels // 2) * d


def rounded_to_q4_1(W: torch.Tensor) -> torch.Tensor:
    """Round as llama.cpp's Q4_1: groups of 32 on 16 levels from the least to the largest weight, d and m float16."""
    groups = W.float().reshape(-1, 32)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    d = (high - low) / 15
    q = ((groups - low) / torch.where(d == 0, 1, d) + 0.5).floor().clamp(0, 15)
    return (q * d.half().float() + low.half().float()).view_as(W)
