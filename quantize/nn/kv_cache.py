"""Every attention of an exported graph gets keys and values as a quantized cache holds them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from quantize.formats.fake_quantize import on_grid
from quantize.graph.basis import Bases
from quantize.graph.interpreter import Overrides, Values
from quantize.graph.program import Program, Segment
from quantize.graph.rules.table import name_of
from quantize.kernels.hadamard import hadamard_transform
from quantize.nn.recent_window import with_recent_rows
from quantize.scheme.scheme import KVCacheArgs
from quantize.transforms import equivalence

ATTENTION = "scaled_dot_product_attention"
Heads = tuple[Tensor, Tensor, Tensor]
Masked = tuple[Tensor, Tensor, Tensor, Tensor | None]  # heads and the mask


def rotate_heads(query: Tensor, key: Tensor, value: Tensor) -> Heads:
    """Multiply queries and keys [..., tokens, head_dim] by a Hadamard matrix H; scores stay, since q H (k H)ᵀ = q kᵀ.

    Positions are applied already, so H need not commute with them (QuaRot, arXiv 2404.00456, section 4; R3 of
    SpinQuant, arXiv 2405.16406). The product is taken in float32 at least and returned in the dtype of the operands.
    """
    size = query.shape[-1]
    query, key = (hadamard_transform(x.float(), size).to(x.dtype) for x in (query, key))
    return query, key, value


def quantize_heads(query: Tensor, key: Tensor, value: Tensor, args: KVCacheArgs) -> Heads:
    """Quantize and dequantize the keys and values among attention's operands [..., tokens, head_dim], row by row.

    A row is one head of one token. It has a scale and a zero point of its own and does not depend on other rows, so it
    is rounded to the same values whenever it is read from a cache.
    """
    if args.hadamard:
        query, key, value = rotate_heads(query, key, value)
    key, value = (on_grid(x.float(), n, args).to(x.dtype) for x, n in zip((key, value), args.bits, strict=True))
    return query, key, value


def read_heads(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, args: KVCacheArgs
) -> Masked:
    """Return attention's operands and mask for keys and values that a quantized cache holds.

    Args:
        query, key, value: [..., tokens, head_dim].
        mask: as `scaled_dot_product_attention` takes it.
        is_causal: what holds without a mask.
        args: how keys and values are rounded, and how many recent tokens are not (`recent_window.py`).
    """
    rounded = quantize_heads(query, key, value, args)
    if not args.residual_length:
        return *rounded, mask
    exact = rotate_heads(query, key, value) if args.hadamard else (query, key, value)
    return with_recent_rows(rounded[0], rounded[1:], exact[1:], mask, is_causal, args.residual_length)


def read_kv_cache(settings: Mapping[str, Any]) -> KVCacheArgs | None:
    """Read the entry of an artifact's quantization settings; None if the cache is in floating point."""
    return KVCacheArgs(**settings["kv_cache"]) if "kv_cache" in settings else None


def attention_nodes(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Return the nodes that are attention, with keys of the same tokens or of an encoder."""
    return [node for node in nodes if node.op == "call_function" and name_of(node) == ATTENTION]


def quantized_attention(segment: Segment, args: KVCacheArgs | None) -> dict[fx.Node, Callable[..., Any]]:
    """Return what runs in place of each attention of a block, for `Overrides.operators`."""
    return {} if args is None else changed_attention(segment, functools.partial(read_heads, args=args))


def changed_attention(segment: Segment, change: Callable[..., Masked]) -> dict[fx.Node, Callable[..., Any]]:
    """Return for each attention of a block the same operator behind `change(query, key, value, mask, is_causal)`."""
    return {node: functools.partial(attend, node.target, change) for node in attention_nodes(segment.nodes)}


def attend(
    target: Any, change: Callable[..., Masked], query: Tensor, key: Tensor, value: Tensor,
    attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """Call an attention operator, which has torch's arguments, on changed operands and with a changed mask."""
    *heads, mask = change(query, key, value, attn_mask, is_causal)
    return target(*heads, mask, dropout_p, is_causal and mask is None, **options)


def rotated(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> Masked:
    """Return `rotate_heads` beside the mask, for `changed_attention`."""
    del is_causal
    return *rotate_heads(query, key, value), mask


def check_hadamard(program: Program, segment: Segment, state: Overrides, probes: Sequence[Values]) -> float:
    """Return the largest relative difference that rotated queries and keys make to a block on two inputs, in float32.

    Raises:
        QuantizeError: the difference is above the gate's tolerance.
    """
    changed = replace(state, operators=changed_attention(segment, rotated))
    found = equivalence.max_relative_difference(program, segment, state, changed, probes, Bases((), {}), {})
    equivalence.require_equivalent("kv_cache", found, equivalence.TOLERANCE, {}, segment)
    return found
