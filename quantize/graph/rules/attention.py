"""Attention: scores pin queries and keys, values mix over tokens within each head."""

from __future__ import annotations

from torch import Tensor, fx

from quantize.graph.group import Group
from quantize.graph.labels import Walk, axis_index, channel_axes, shape_of
from quantize.graph.rules.table import arguments, name_of, pin_all, rule


@rule("scaled_dot_product_attention")
def attention(walk: Walk, node: fx.Node) -> None:
    """softmax(q kᵀ) v: the scores pin queries and keys; each head averages its value channels over the tokens."""
    q, k, v = arguments(node)[:3]
    for source in (q, k):
        walk.pin(source, "attention scores multiply queries with keys")
    if v in walk.labels:
        mix_tokens(walk, node, v, walk.labels[v])


@rule("matmul", "bmm")
def product(walk: Walk, node: fx.Node) -> None:
    """A product of two computed values mixes tokens of the right one if that lies with channels last."""
    a, b = arguments(node)
    if a in walk.labels or a in walk.squares or b not in walk.labels:
        return pin_all(walk, node, f"`{name_of(node)}` multiplies it with another value")
    mix_tokens(walk, node, b, walk.labels[b])


def mix_tokens(walk: Walk, node: fx.Node, source: fx.Node, labels: Tensor) -> None:
    """Sums over axis -2 with weights of their own for each index of the axes before: heads must not mix."""
    if bool((labels != labels.narrow(-2, 0, 1)).any()):
        return walk.pin(source, f"`{name_of(node)}` sums over its channels")
    heads = [d for d in channel_axes(labels) if d < labels.dim() - 2]
    if heads:
        walk.restrict(labels, Group.LINEAR, "", blocks=axis_index(labels, heads[0]))
    shape, row = shape_of(node), labels.narrow(-2, 0, 1)
    for d in heads:  # grouped queries: each key/value head serves a run of query heads
        row = row.repeat_interleave(shape[d] // row.shape[d], dim=d)
    walk.labels[node] = row.expand(shape)
