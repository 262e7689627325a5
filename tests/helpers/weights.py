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
