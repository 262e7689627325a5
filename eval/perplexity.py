"""The loss of a causal language model on fixed windows, and its divergence from the float model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax


@dataclass(frozen=True)
class LanguageScores:
    """Means over all predicted tokens.

    Attributes:
        loss: the cross-entropy in nats per token.
        kl: Σ p log(p/q) in nats per token, where p is the float model's distribution; None without a float model.
        top1: the part of the tokens for which both models rank the same token first; None without a float model.
        tokens: the number of tokens predicted.
    """

    loss: float
    kl: float | None
    top1: float | None
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


@torch.no_grad()
def score_language(model: nn.Module, batches: Sequence[Tensor], against: nn.Module | None = None) -> LanguageScores:
    """Score windows of token ids, each batch [B, T]; every token but a window's first is predicted.

    Args:
        model: a model that returns `logits` [B, T, V].
        batches: the token ids of the fixed slice.
        against: the float model; None leaves divergence out.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for ids in batches:
        logits, labels = logits_of(model, ids), ids[:, 1:].reshape(-1)
        sums[0] += cross_entropy(logits, labels, reduction="sum")
        if against is not None:
            sums[1:] += divergence(logits, logits_of(against, ids))
    tokens = sum(ids[:, 1:].numel() for ids in batches)
    loss, kl, top1 = (sums / tokens).tolist()
    return LanguageScores(loss, kl, top1, tokens) if against is not None else LanguageScores(loss, None, None, tokens)


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the logits that predict each token, [tokens, V] float32."""
    return model(input_ids=ids).logits[:, :-1].flatten(0, 1).float()  # type: ignore[no-any-return]


def divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """Return float64 [2]: Σ KL(reference ‖ logits), and the number of tokens that both rank first."""
    log_q, log_p = log_softmax(logits, -1), log_softmax(reference, -1)
    kl = kl_div(log_q, log_p, reduction="sum", log_target=True)
    agree = (logits.argmax(-1) == reference.argmax(-1)).sum()
    return torch.stack([kl.double(), agree.double()])
