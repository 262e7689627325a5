"""The code between an expert's two products is recognised as a SwiGLU by running it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LARGE = 1e6  # no limit on activations is as large
CLOSE = 1e-6  # relative; the same formula in float64 differs by less
STEPS = 20  # of a fixed-point iteration, whose errors fall by α limit exp(-α limit) in each


@dataclass(frozen=True)
class SwiGLU:
    """g σ(αg) (l + β) of gates g, at most `limit`, and linear values l between -`limit` and `limit`.

    Attributes:
        alpha, beta, limit: α, β, and the limit, which may be infinite.
        interleaved: whether gates and linear values take turns, or follow each other as two halves.
    Source: onnxruntime, docs/ContribOperators.md, com.microsoft.QMoE.
    """

    alpha: float = 1.0
    beta: float = 0.0
    limit: float = math.inf
    interleaved: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        """Map [..., 2 I] to [..., I]."""
        g, linear = (x[..., ::2], x[..., 1::2]) if self.interleaved else x.chunk(2, dim=-1)
        g, linear = g.clamp(max=self.limit), linear.clamp(-self.limit, self.limit)
        return g * torch.sigmoid(self.alpha * g) * (linear + self.beta)


def swiglu_of(between: Callable[[Tensor], Tensor], width: int) -> SwiGLU | None:
    """Return the SwiGLU that a function from [S, width] to [S, width / 2] computes, or None if it computes another one.

    Three of its values tell α, β and the limit, if it is one; random rows that reach beyond most limits tell whether.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(32, width, dtype=torch.float64, generator=generator) * 10.0 ** torch.linspace(-1, 4, 32)[:, None]
    expected = between(rows)
    for interleaved in (False, True):
        found = fitted(between, width, interleaved)
        if found is not None and bool(torch.isclose(found(rows), expected, rtol=CLOSE, atol=0).all()):
            return found
    return None


def fitted(between: Callable[[Tensor], Tensor], width: int, interleaved: bool) -> SwiGLU | None:
    """Return the SwiGLU of a layout whose values at three places are those of a function; None if there is none."""
    g, linear = torch.tensor([[1.0, 1.0, LARGE], [0.0, 1.0, 1.0]], dtype=torch.float64)
    halves = torch.stack([g, linear], 1 if interleaved else 0)
    places = halves.repeat(1, width // 2) if interleaved else halves.T.repeat_interleave(width // 2, dim=1)
    alone, both, large = between(places)[:, 0].tolist()
    if not 0 < both - alone < 1:  # which is σ(α)
        return None
    sigmoid = both - alone
    alpha, beta = math.log(sigmoid / (1 - sigmoid)), alone / sigmoid
    limit = value = large / (1 + beta)
    for _ in range(STEPS):  # to limit · σ(α limit) = value
        limit = value * (1 + math.exp(-alpha * limit))
    return SwiGLU(alpha, beta, math.inf if limit > LARGE * (1 - CLOSE) else limit, interleaved)
