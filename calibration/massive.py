"""Massive activations are thousands of times larger than most; some tokens carry them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from quantize.graph.labels import shape_of
from quantize.graph.program import Program, Segment

ABSOLUTE, RATIO = 100.0, 1000.0  # arXiv 2402.17762, eq. 2
UPPER, LOWER = 64.0, 8.0  # arXiv 2410.05265, eq. 4: R > 64, or 1/R > 8
TOP = 3


@dataclass(frozen=True)
class Activation:
    """One activation: its magnitude |a|, the ratio |a| / median(|h|) in its sequence, and its place."""

    value: float
    ratio: float
    row: int
    position: int
    token: int
    channel: int

    @property
    def massive(self) -> bool:
        """Whether |a| > 100 and |a| ≥ 1000 median(|h|) (arXiv 2402.17762, eq. 2)."""
        return self.value > ABSOLUTE and self.large

    @property
    def large(self) -> bool:
        """Whether |a| ≥ 1000 median(|h|), without the bound of 100, too high for small models (arXiv 2508.03616)."""
        return self.ratio >= RATIO


@dataclass
class HiddenStateStats:
    """Statistics of the hidden states [B, T, C] at one place, taken batch by batch.

    Attributes:
        name: the name of the block behind which the hidden states are.
        medians: the median of |h| in each sequence.
        top: the three largest activations of all sequences.
        large: token id and channel → the largest `large` activation there, and the number of them.
        tokens: token id → how often the token rule flags it as large, R > 64.
        small: token id → how often the token rule flags it as far below the rest, 1 / R > 8.
    """

    name: str
    medians: list[float] = field(default_factory=list)
    top: list[Activation] = field(default_factory=list)
    large: dict[tuple[int, int], tuple[Activation, int]] = field(default_factory=dict)
    tokens: Counter[int] = field(default_factory=Counter)
    small: Counter[int] = field(default_factory=Counter)

    def update(self, h: Tensor, ids: Tensor) -> None:
        """Take in h [B, T, C] at the token ids [B, T]."""
        size = h.detach().abs().float()
        median, before = size.flatten(1).median(1).values, len(self.medians)
        ratio = size / median.clamp(min=torch.finfo(size.dtype).tiny)[:, None, None]
        self.medians += median.tolist()

        def at(index: tuple[int, ...]) -> Activation:
            row, position, channel = index
            token = int(ids[row, position])
            return Activation(float(size[index]), float(ratio[index]), before + row, position, token, channel)

        largest = size.flatten().topk(min(TOP, size.numel())).indices
        found = [at(tuple(int(i) for i in torch.unravel_index(place, size.shape))) for place in largest]
        self.top = sorted([*self.top, *found], key=lambda a: -a.value)[:TOP]
        for index in (ratio >= RATIO).nonzero().tolist():
            self._note(at(tuple(index)))
        R = outlier_ratios(h)
        self.tokens.update(ids[R > UPPER].tolist())
        self.small.update(ids[R * LOWER < 1].tolist())

    def _note(self, a: Activation) -> None:
        key = (a.token, a.channel)
        best, count = self.large.get(key, (a, 0))
        self.large[key] = (max(best, a, key=lambda x: x.value), count + 1)

    @property
    def median(self) -> float:
        """The mean of the sequences' medians."""
        return sum(self.medians) / len(self.medians)


def outlier_ratios(x: Tensor) -> Tensor:
    """Return R_i = M_i / median(M), float32 [B, T], of x [B, T, C]; M_i = max_c |X_ic|, its median over a sequence.

    The token rule of PrefixQuant (arXiv 2410.05265, eq. 4) flags R > 64, and tokens far below the rest by 1 / R > 8.
    """
    M = x.detach().abs().amax(-1).float()
    return M / M.median(dim=-1, keepdim=True).values.clamp(min=torch.finfo(M.dtype).tiny)


def rows_are_tokens(program: Program, node: fx.Node) -> bool:
    """Return whether a value is [batch, tokens, C] or [batch * tokens, C]."""
    batch, tokens = shape_of(next(iter(program.inputs.values())))[:2]
    return shape_of(node)[:-1] in ((batch, tokens), (batch * tokens,))


def hidden_states(program: Program, segment: Segment) -> list[fx.Node]:
    """Return the floating-point values [batch, tokens, C] that a segment makes and a later one reads."""
    if segment.name == "tail":  # what comes behind the last block are scores and no hidden states
        return []
    inside, sizes = set(segment.nodes), shape_of(next(iter(program.inputs.values())))
    read_later = (n for n in segment.nodes if n in program.last_use and program.last_use[n] not in inside)
    return [n for n in read_later if is_float(n) and len(shape_of(n)) == 3 and shape_of(n)[:2] == sizes]


def is_float(node: fx.Node) -> bool:
    """Return whether a node's value is one floating-point tensor."""
    value: Any = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()
