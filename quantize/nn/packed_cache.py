"""A KV cache that holds keys and values as integers, in the memory that these take.

A row, one head of one token, is stored as bytes: its integers, two to a byte if they have 4 bits, then its scale as a
float32, then its zero point. So transformers' own layers of a cache append, crop, reorder and repeat rows as they are.
With a `residual_length` a layer has a second one, which holds the last rows in floating point, too: transformers' layer
for a sliding window. A row is packed when it comes and stays among the recent ones until it leaves that window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from quantize.errors import UsageError
from quantize.kernels.hadamard import hadamard_factors, hadamard_transform, kronecker_transform
from quantize.kernels.packing import pack_int4, unpack_int4
from quantize.kernels.reference import quantize_per_token
from quantize.nn.attention import RECENT, configs, kv_cache_of
from quantize.scheme.scheme import KVCacheArgs

SCALE = 4  # bytes
FOLLOWED = (
    "crop", "reset", "reorder_cache", "batch_repeat_interleave", "batch_select_indices", "offload", "prefetch",
    "activate_past_recording",
)  # fmt: skip


class PackedRows:
    """What a layer of a packed cache does in front of and behind the layer of transformers that it also is."""

    args: KVCacheArgs
    recent: DynamicSlidingWindowLayer | None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append rows [batch, heads, tokens, head_dim], and return all of them as rounded, in their dtype.

        The keys carry the last rows in floating point for `attend_with_quantized_cache`: `residual_length` of those
        held before, and the new ones.
        """
        size, dtype = key_states.shape[-1], key_states.dtype
        turned = hadamard_transform(key_states.float(), size).to(dtype) if self.args.hadamard else key_states
        rows = [pack_rows(x, n, self.args) for x, n in zip((turned, value_states), self.args.bits, strict=True)]
        held = cast(DynamicLayer, super()).update(*rows, *args, **kwargs)
        sizes = (size, value_states.shape[-1])
        key, value = (unpack_rows(x, n, K, self.args) for x, n, K in zip(held, self.args.bits, sizes, strict=True))
        key = (turned_back(key) if self.args.hadamard else key).to(dtype)
        last = None if self.recent is None else self.recent.update(key_states, value_states)
        setattr(key, RECENT, last and tuple(x[..., -key.shape[-2] :, :] for x in last))
        return key, value.to(dtype)


def followed(name: str) -> Callable[..., None]:
    """Return the method of a layer that both the recent rows and the packed ones go through, where they have it."""

    def method(self: PackedRows, *args: Any) -> None:
        for part in (self.recent, super(PackedRows, self)):
            if (found := getattr(part, name, None)) is not None:
                found(*args)

    return method


for name in FOLLOWED:
    setattr(PackedRows, name, followed(name))


class PackedLayer(PackedRows, DynamicLayer):  # type: ignore[misc]
    """A layer that sees all tokens."""


class PackedSlidingLayer(PackedRows, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A layer that sees the last tokens."""


KINDS = {DynamicLayer: PackedLayer, DynamicSlidingWindowLayer: PackedSlidingLayer}


def packed_cache(model: PreTrainedModel) -> DynamicCache:
    """Return an empty cache for `generate` or a call of a loaded artifact with a table `[kv_cache]`.

    Its rows take the artifact's bits and five bytes, four with symmetric grids; the last `residual_length` of them are
    also held as they came. Attention gets the same numbers as without it, up to the last bits of a float; the rows of
    one layer are in floating point while it runs.

    Args:
        model: a model from `quantize.load`; `generate(..., past_key_values=packed_cache(model))`, which newer versions
            of transformers call `cache`.

    Raises:
        UsageError: the artifact does not quantize the KV cache.
    """
    args = next((found for config in configs(model) if (found := kv_cache_of(config)) is not None), None)
    if args is None:
        raise UsageError("the model's keys and values are in floating point; quantize with a table [kv_cache]")
    cache = DynamicCache(config=model.config)
    cache.layers = [packed(layer, args) for layer in cache.layers]
    return cache


def packed(layer: Any, args: KVCacheArgs) -> Any:
    """Return a packed layer in the place of an empty one of keys and values; others stay as they are."""
    if type(layer) not in KINDS:
        return layer
    made = object.__new__(KINDS[type(layer)])
    length = args.residual_length
    made.__dict__.update(vars(layer), args=args, recent=DynamicSlidingWindowLayer(length + 1) if length else None)
    return made


def turned_back(key: Tensor) -> Tensor:
    """Undo `hadamard_transform` of [..., head_dim]."""
    a, b = (factor.to(key).mT for factor in hadamard_factors(key.shape[-1]))
    return kronecker_transform(key, a, b)


def pack_rows(x: Tensor, num_bits: int, args: KVCacheArgs) -> Tensor:
    """Round rows [..., K] to a grid each: uint8 [..., bytes]."""
    q, scale, zero_point = quantize_per_token(x.float(), num_bits, args.symmetric, args.clip_ratio)
    codes = pack_int4(q) if num_bits == 4 else q.view(torch.uint8)
    last = [] if args.symmetric else [zero_point.view(torch.uint8)]
    scale = scale.clone(memory_format=torch.contiguous_format)
    return torch.cat([codes, scale.view(torch.uint8), *last], dim=-1)


def unpack_rows(rows: Tensor, num_bits: int, columns: int, args: KVCacheArgs) -> Tensor:
    """Return float32 [..., columns] of `pack_rows`."""
    codes = rows[..., : -(-columns * num_bits // 8)]
    scale = (
        rows[..., codes.shape[-1] : codes.shape[-1] + SCALE]
        .clone(memory_format=torch.contiguous_format)
        .view(torch.float32)
    )
    q = (unpack_int4(codes, columns) if num_bits == 4 else codes.view(torch.int8)).float()
    return (q if args.symmetric else q - rows[..., -1:].view(torch.int8).float()) * scale
