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
from quantize.scheme.scheme import KVCacheArgs
from quantize.transforms import equivalence

ATTENTION = "scaled_dot_product_attention"
Heads = tuple[Tensor, Tensor, Tensor]


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


def read_kv_cache(settings: Mapping[str, Any]) -> KVCacheArgs | None:
    """Read the entry of an artifact's quantization settings; None if the cache is in floating point."""
    return KVCacheArgs(**settings["kv_cache"]) if "kv_cache" in settings else None


def attention_nodes(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Return the nodes that are attention, with keys of the same tokens or of an encoder."""
    return [node for node in nodes if node.op == "call_function" and name_of(node) == ATTENTION]


def quantized_attention(segment: Segment, args: KVCacheArgs | None) -> dict[fx.Node, Callable[..., Any]]:
    """Return what runs in place of each attention of a block, for `Overrides.operators`."""
    return {} if args is None else changed_attention(segment, functools.partial(quantize_heads, args=args))


def changed_attention(segment: Segment, change: Callable[..., Heads]) -> dict[fx.Node, Callable[..., Any]]:
    """Return for each attention of a block the same operator behind `change(query, key, value)`."""
    return {
        node: functools.partial(attend_on_changed_heads, node.target, change) for node in attention_nodes(segment.nodes)
    }


def attend_on_changed_heads(target: Any, change: Callable[..., Heads], *args: Any, **options: Any) -> Any:
    """Call an attention operator on changed queries, keys and values, which are its first three arguments."""
    return target(*change(*args[:3]), *args[3:], **options)


def check_hadamard(program: Program, segment: Segment, state: Overrides, probes: Sequence[Values]) -> float:
    """Return the largest relative difference that rotated queries and keys make to a block on two inputs, in float32.

    Raises:
        QuantizeError: the difference is above the gate's tolerance.
    """
    rotated = replace(state, operators=changed_attention(segment, rotate_heads))
    found = equivalence.max_relative_difference(program, segment, state, rotated, probes, Bases((), {}), {})
    equivalence.require_equivalent("kv_cache", found, equivalence.TOLERANCE, {}, segment)
    return found
