"""The loss of a causal language model on fixed windows, and its divergence from the float model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from quantize.calibration.logits import Divergence, divergence
from quantize.eval.logits import logits_in_chunks, tokens_at_once


@dataclass(frozen=True)
class LanguageScores:
    """Means over all predicted tokens.

    Attributes:
        loss: the cross-entropy in nats per token.
        tokens: the number of tokens predicted.
        kl: Σ p log(p/q) in nats per token, where p is the float model's distribution; None without a float model.
        top1: the part of the tokens for which both models rank the same token first; None without a float model.
        loss_against: the cross-entropy of the float model; None without one.
    """

    loss: float
    tokens: int
    kl: float | None = None
    top1: float | None = None
    loss_against: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


@torch.no_grad()
def score_language(model: nn.Module, batches: Sequence[Tensor], against: nn.Module | None = None) -> LanguageScores:
    """Score windows of token ids, each batch [B, T]; every token but a window's first is predicted.

    The logits of each model take `LOGIT_BYTES`, 64 MiB, or those of one token of each window if they take more. Beside
    them only a `forward` that scales or caps logits holds tensors of this size, one model at a time.

    Args:
        model: a model that returns `logits` [B, T, V].
        batches: the token ids of the fixed slice.
        against: the float model; None leaves divergence out.
    """
    total = Divergence()
    for ids in batches:
        count = tokens_at_once(model, len(ids))
        chunks = [logits_in_chunks(each, ids, count) for each in (model, against) if each is not None]
        for labels, *logits in zip(ids[:, 1:].split(count, 1), *chunks, strict=True):
            total += compare(labels.flatten(), *(part.flatten(0, 1) for part in logits))
    if against is None:
        return LanguageScores(total.mean("loss"), total.tokens)
    means = (total.mean(name) for name in ("kl", "top1", "reference_loss"))
    return LanguageScores(total.mean("loss"), total.tokens, *means)


def compare(labels: Tensor, logits: Tensor, reference: Tensor | None = None) -> Divergence:
    """Compare logits [tokens, V] with those of a reference, if there is one, and with the tokens [tokens] that come."""
    if reference is not None:
        return divergence(logits, reference, labels)
    return Divergence(len(labels), float(cross_entropy(logits, labels, reduction="sum")))
