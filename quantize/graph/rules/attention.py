"""In attention, scores pair queries with keys, and values mix over tokens within each head."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from quantize.graph.allowed_transforms import AllowedTransforms
from quantize.graph.labels import ChannelTrace, axis_index, channel_axes, id_pairs, shape_of, trimmed
from quantize.graph.rules.table import SOURCES, arguments, name_of, pin_all, rule
from quantize.graph.rules.weights import multiply


@rule("scaled_dot_product_attention", operands=3)
def attention(walk: ChannelTrace, node: fx.Node) -> None:
    """In softmax(q kᵀ) v each head averages its value channels over the tokens."""
    q, k, v = arguments(node)[:3]
    pair(walk, q, k, -2)
    if v in walk.labels:
        mix_tokens(walk, node, v, walk.labels[v])
    else:
        pin_all(walk, node, "it is mixed by attention")


@rule("matmul", "bmm", "mm", operands=2, kind=SOURCES)
def product(walk: ChannelTrace, node: fx.Node) -> None:
    """A product is one with a parameter, of queries with keys, or of scores with values."""
    a, b = arguments(node)
    if (view := walk.view(b)) is not None and len(view.size) > 1:
        return multiply(walk, node, a, view, (-2, -1))
    if any(n in walk.squares or n in walk.means for n in (a, b)) or (a in walk.labels and b not in walk.labels):
        return pin_all(walk, node, f"`{name_of(node)}` multiplies it with another value")
    if a in walk.labels:
        pair(walk, a, b, -1)
    elif b in walk.labels:
        mix_tokens(walk, node, b, walk.labels[b])


@rule("baddbmm", operands=3)
def added_product(walk: ChannelTrace, node: fx.Node) -> None:
    """The operator multiplies queries with keys and adds a bias to the scores."""
    bias, q, k = arguments(node)[:3]
    walk.pin(bias, "it is added to attention scores")
    pair(walk, q, k, -1)


def pair(walk: ChannelTrace, q: fx.Node, k: fx.Node, token_axis: int) -> None:
    """Pair the channels of scores Σ q_i k_i: T⁻ᵀ must do to keys what T does to queries. `token_axis` is the keys'."""
    reason = "attention scores multiply it with something that no weight writes"
    rows = [token_row(walk, n, axis) for n, axis in ((q, -2), (k, token_axis))]
    if rows[0] is None or rows[1] is None or rows[0].shape[-1] != rows[1].shape[-1]:
        walk.pin(q, reason)
        return walk.pin(k, reason)
    a, b = rows[0], rows[1]
    for d in (d for d in range(a.dim() - 1) if b.shape[d] not in (1, a.shape[d])):  # grouped queries
        b = b.repeat_interleave(a.shape[d] // b.shape[d], dim=d)
    a, b = trimmed(*torch.broadcast_tensors(a, b))
    walk.paired.append(id_pairs(a, b))
    apart = [d for d in range(a.dim() - 1) if a.shape[d] > 1]
    for side in (a, b):
        walk.restrict(side, AllowedTransforms.LINEAR, "", axis_index(side, apart), counted=True)


def token_row(walk: ChannelTrace, node: fx.Node, token_axis: int) -> Tensor | None:
    """Return the labels of one token, channels last, if all tokens have the same labels."""
    labels = walk.labels.get(node)
    if labels is None or token_axis % labels.dim() in channel_axes(labels):
        return None
    row = labels.narrow(token_axis, 0, 1)
    return row if token_axis == -2 else row.transpose(-1, -2)


def mix_tokens(walk: ChannelTrace, node: fx.Node, source: fx.Node, labels: Tensor) -> None:
    """Treat sums over axis -2 whose weights differ for each index of the axes before, so that heads must not mix."""
    axes, shape = channel_axes(labels), shape_of(node)
    if labels.dim() - 2 in axes or len(shape) != labels.dim():
        return walk.pin(source, f"`{name_of(node)}` sums over its channels")
    heads = [d for d in axes if d < labels.dim() - 2]
    if heads:
        walk.restrict(labels, AllowedTransforms.LINEAR, "", blocks=axis_index(labels, heads))
    row = labels.narrow(-2, 0, 1)
    for d in heads:  # grouped queries: each key/value head serves a run of query heads
        row = row.repeat_interleave(shape[d] // row.shape[d], dim=d)
    walk.labels[node] = row.expand(shape)
