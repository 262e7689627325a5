"""Operands of the kernels are random and in the layout of each scheme."""

from __future__ import annotations

import torch

from quantize.kernels.packed import pack_activations
from quantize.kernels.prepack import prepack

SCHEMES = {  # bits of weights and activations, layout of activations, variant
    "W8A8": (8, 8, "int8", "bytes"),
    "W4A8 shift": (4, 8, "int8", "shift"),
    "W4A8 mask": (4, 8, "int8", "mask"),
    "W4A4 pair": (4, 4, "pair", "pair"),
    "W4A4 shift": (4, 4, "int8", "shift"),
}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def weight(N, K, bits=4, groups=1, symmetric=True, seed=0):
    low, high = -(1 << bits - 1), 1 << bits - 1
    q = torch.randint(low, high, (N, K), generator=rng(seed), dtype=torch.int8)
    scale = torch.rand(N, groups, generator=rng(seed + 1)) + 0.1
    zero = None if symmetric else torch.randint(low, high, (N, groups), generator=rng(seed + 2), dtype=torch.int8)
    return prepack(q, scale, zero, bits)


def activations(M, K, bits=8, layout="int8", symmetric=True, group_size=0, seed=5):
    low, high = -(1 << bits - 1), 1 << bits - 1
    q = torch.randint(low, high, (M, K), generator=rng(seed), dtype=torch.int8)
    zero = torch.randint(low, high, (M,), generator=rng(seed + 2)) * (not symmetric)
    return pack_activations(q, torch.rand(M, generator=rng(seed + 1)) + 0.1, zero, layout, group_size)
