"""Operands on the meta device have shapes but no memory, for kernels that are compiled and not run."""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.kernels.packed import PackedWeight, QuantizedActivations

GROUP = 128


def meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """Return a tensor of the meta device."""
    return torch.empty(shape, dtype=dtype, device="meta")


def meta_weight(N: int, K: int, layout: str, in_groups: bool = False) -> PackedWeight:
    """Return asymmetric weights in a layout, with one scale a channel or with 8-bit scales for groups of 128."""
    G = K // GROUP if in_groups else 1
    return PackedWeight(
        data=meta(N, K if layout == "w8" else K // 2, dtype=torch.int8),
        scale=meta(N, dtype=torch.float32),
        group_scale=meta(G, N, dtype=torch.uint8) if in_groups else None,
        zero_point=meta(G, N),
        weight_sum=meta(G, N),
        high_sum=meta(N),
        counters=meta(N),
        columns=K,
        layout=layout,
    )


def meta_activations(M: int, K: int, layout: str, in_groups: bool = False) -> QuantizedActivations:
    """Return asymmetric activations in a layout, with the sums that such weights need."""
    return QuantizedActivations(
        q=meta(M, K // 2 if layout == "s4" else K, dtype=torch.int8),
        scale=meta(M, dtype=torch.float32),
        zero_point=meta(M),
        sum=meta(M, K // GROUP if in_groups else 1),
        low_sum=meta(M),
        layout=layout,
    )
