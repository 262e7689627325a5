"""The keys and values of books-llama-6m, and what the model loses when a cache changes them.

Everything is rounded, as nothing of a short window would be if its first and last tokens stayed in floating point.
Methods are fitted on the bundled prose and measured on unseen text (`small_model.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from benchmarks.claims.small_model import BOOKS, WINDOW, load, windows
from quantize.calibration.data import BUNDLED
from quantize.eval.loading import load_any
from quantize.eval.perplexity import score_language
from quantize.kernels.hadamard import hadamard_transform
from quantize.nn.attention import configs

NAME = "claimed_kv_cache"
FITTED = 8  # windows of 256 tokens

Heads = tuple[Tensor, Tensor, Tensor]  # queries, keys and values [batch, heads, tokens, head_dim]
Change = Callable[[int, Tensor, Tensor, Tensor], Heads]


class Rows(NamedTuple):
    """What one layer made of the fitted tokens: [heads, tokens, head_dim] each, gradients those of the loss."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_gradient: Tensor
    value_gradient: Tensor


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, change: Change, **options: Any
) -> tuple[Tensor, None]:
    """Compute float attention on what `change` makes of a layer's queries, keys and values."""
    layer: Any = module.layer_idx
    y: Tensor = sdpa_attention_forward(module, *change(layer, query, key, value), mask, **options)[0]
    return y, None


@functools.cache
def changeable() -> nn.Module:
    """Return a copy of the model whose attention is the last one that was registered."""
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model = load_any(BOOKS)
    for config in configs(model):
        config._attn_implementation = {"": NAME}
    return model


def divergence(change: Change) -> float:
    """Return the KL divergence from the float model on unseen text, in nats per token."""
    model = changeable()
    AttentionInterface.register(NAME, functools.partial(attend, change=change))
    return score_language(model, windows(), load(BOOKS)).kl or 0.0


@functools.cache
def recorded() -> tuple[Rows, ...]:
    """Return what each layer makes of windows of the bundled prose."""
    model, found = changeable(), dict[int, Heads]()

    def keep(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Heads:
        found[layer] = query, key, value
        key.retain_grad()
        value.retain_grad()
        return query, key, value

    AttentionInterface.register(NAME, functools.partial(attend, change=keep))
    ids = windows(BOOKS, BUNDLED, FITTED)[0]
    with torch.enable_grad():
        model(ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad()
    made = []
    for _, heads in sorted(found.items()):
        gradients = [x.grad for x in heads[1:] if x.grad is not None]
        made.append(Rows(*(x.detach().transpose(0, 1).flatten(1, 2) for x in (*heads, *gradients))))
    return tuple(made)


def rounded(x: Tensor, bits: int, clip_ratio: float = 1.0, dim: int = -1) -> Tensor:
    """Round to 2^bits even levels over a part of the range along `dim`, with a zero point."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    cut = (high - low) * (1 - clip_ratio) / 2
    steps = (1 << bits) - 1
    low, step = low + cut, ((high - low - 2 * cut) / steps).clamp(min=1e-10)
    return ((x - low) / step).round().clamp(0, steps) * step + low


def turned(x: Tensor) -> Tensor:
    """Multiply [..., head_dim] by a Hadamard matrix, which is its own inverse."""
    return hadamard_transform(x, x.shape[-1])


def per_token(bits: tuple[int, int], clip_ratios: tuple[float, float] = (1.0, 1.0), rotate: bool = False) -> Change:
    """Return plain rounding of each head of each token, behind a Hadamard matrix if asked for."""

    def change(_: int, query: Tensor, *rows: Tensor) -> Heads:
        each = zip(rows, bits, clip_ratios, strict=True)
        key, value = (turned(rounded(turned(x), b, clip)) if rotate else rounded(x, b, clip) for x, b, clip in each)
        return query, key, value

    return change


def positions_undone(x: Tensor, sign: int = -1) -> Tensor:
    """Undo the rotary embedding of keys [..., tokens, head_dim] of whole windows, or apply it with a sign of 1."""
    model: Any = load(BOOKS)
    cos, sin = model.model.rotary_emb(x, torch.arange(x.shape[-2])[None] % WINDOW)
    first, second = x.chunk(2, dim=-1)
    found: Tensor = x * cos + sign * torch.cat([-second, first], dim=-1) * sin
    return found
