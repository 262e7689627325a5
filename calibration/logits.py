"""Two models' logits on the same tokens are compared a few tokens at a time, so that large vocabularies fit."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, nll_loss

CHUNK = 1 << 20  # logits that are compared together; intermediate results of more leave the cache


@dataclass(frozen=True)
class Divergence:
    """Sums over tokens.

    Attributes:
        tokens: the number of tokens.
        loss: Σ -log q(next token), in nats.
        reference_loss: the same of the reference.
        kl: Σ KL(p ‖ q), where p is the reference's distribution, in nats.
        top1: the number of tokens for which both rank the same token first.
    """

    tokens: int = 0
    loss: float = 0.0
    reference_loss: float = 0.0
    kl: float = 0.0
    top1: int = 0

    def __add__(self, other: Divergence) -> Divergence:
        return Divergence(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def mean(self, name: str) -> float:
        """Return one of the sums for each token."""
        found: float = getattr(self, name) / max(self.tokens, 1)
        return found


@torch.no_grad()
def divergence(logits: Tensor, reference: Tensor, labels: Tensor) -> Divergence:
    """Compare logits [tokens, V] with those of a reference; `labels` [tokens] are the tokens that come next."""
    total, rows = Divergence(), max(1, CHUNK // logits.shape[-1])
    for part in zip(logits.split(rows), reference.split(rows), labels.split(rows), strict=True):
        q, p = (log_softmax(x.float(), -1) for x in part[:2])
        kl = kl_div(q, p, reduction="sum", log_target=True)
        loss, reference_loss = (float(nll_loss(x, part[2], reduction="sum")) for x in (q, p))
        total += Divergence(len(q), loss, reference_loss, float(kl), int((q.argmax(-1) == p.argmax(-1)).sum()))
    return total
