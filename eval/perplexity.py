"""The loss of a causal language model on fixed windows, and its divergence from the float model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, nll_loss

from quantize.eval.logits import logits_in_chunks, tokens_at_once

SCORED_LOGITS = 1 << 20  # logits of a model that are scored together, so that intermediate results stay in the cache


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
    sums = torch.zeros(4, dtype=torch.float64)
    for ids in batches:
        count = tokens_at_once(model, len(ids))
        chunks = [logits_in_chunks(each, ids, count) for each in (model, against) if each is not None]
        for labels, *logits in zip(ids[:, 1:].split(count, 1), *chunks, strict=True):
            rows = [labels.flatten(), *(part.flatten(0, 1) for part in logits)]
            few = max(1, SCORED_LOGITS // logits[0].shape[-1])
            for some in zip(*(part.split(few) for part in rows), strict=True):
                sums += chunk_sums(*some)
    tokens = sum(ids[:, 1:].numel() for ids in batches)
    loss, kl, top1, loss_against = (sums / tokens).tolist()
    return LanguageScores(loss, tokens, *((kl, top1, loss_against) if against is not None else ()))


def chunk_sums(labels: Tensor, logits: Tensor, reference: Tensor | None = None) -> Tensor:
    """Return sums over tokens, float64 [4]: the loss, the divergence, the tokens ranked alike, the reference's loss.

    Args:
        labels: [tokens].
        logits: [tokens, V].
        reference: the float model's logits, [tokens, V]; None gives 0 for all that needs them.
    """
    log_q, sums = log_softmax(logits, -1), torch.zeros(4, dtype=torch.float64)
    sums[0] = nll_loss(log_q, labels, reduction="sum")
    if reference is not None:
        log_p = log_softmax(reference, -1)
        sums[1:3] = divergence(log_q, log_p)
        sums[3] = nll_loss(log_p, labels, reduction="sum")
    return sums


def divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Return float64 [2] for log-probabilities [tokens, V]: Σ KL(p ‖ q), and the number of tokens both rank first."""
    kl = kl_div(log_q, log_p, reduction="sum", log_target=True)
    return torch.stack([kl.double(), (log_q.argmax(-1) == log_p.argmax(-1)).sum().double()])
