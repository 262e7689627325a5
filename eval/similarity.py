"""Sentence similarity tells how well an encoder ranks pairs of sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from quantize.errors import UsageError

BATCH = 64
LARGEST = 1 << 24  # bytes of a file of scored pairs; the largest known has a tenth of it
LONGEST = 1 << 14  # characters of a sentence, which is tokenized whole
Pairs = Sequence[tuple[float, str, str]]


@dataclass(frozen=True)
class SimilarityScores:
    """How well an encoder ranks pairs, and how far its embeddings are from those of the float model.

    Attributes:
        spearman: the correlation of cosine similarity with the gold scores, in [-1, 1].
        distance: 1 - the cosine of an embedding with that of the float model, in [0, 2], averaged over all sentences;
            None without a float model. It tells models apart where a few hundred pairs cannot.
    """

    spearman: float
    distance: float | None


def read_pairs(path: Path) -> list[tuple[float, str, str]]:
    """Read rows of `score <tab> sentence <tab> sentence`; rows without a score are skipped (STS gold files).

    Raises:
        UsageError: there is no such file, or it holds fewer than two scored pairs, or a sentence is too long.
    """
    if not path.is_file():
        raise UsageError(f"no such text file: {path}")
    if path.stat().st_size > LARGEST:
        raise UsageError(f"{path} has {path.stat().st_size} bytes; scored pairs may take {LARGEST}, so give fewer")
    try:
        rows = [line.split("\t") for line in path.read_text("utf-8").splitlines()]
        pairs = [(float(row[0]), row[1], row[2]) for row in rows if len(row) >= 3 and row[0].strip()]
        if not all(math.isfinite(score) for score, _, _ in pairs):
            raise ValueError
    except ValueError:
        raise UsageError(f"{path} holds a score that is no finite number, or is not UTF-8 text") from None
    if any(len(sentence) > LONGEST for _, *both in pairs for sentence in both):
        raise UsageError(f"{path} holds a sentence of more than {LONGEST} characters; give shorter ones")
    if len(pairs) < 2:
        raise UsageError(f"{path} holds fewer than two rows of score, sentence and sentence, separated by tabs")
    return pairs


@torch.no_grad()
def embed(model: nn.Module, tokenizer: Any, sentences: list[str]) -> Tensor:
    """Return the mean of the last hidden states over the tokens of each sentence, [sentences, hidden].

    Sentences run in order of length, so that a batch holds little padding.
    """
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    rows: list[Tensor] = [torch.empty(0)] * len(sentences)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        inputs = tokenizer([sentences[i] for i in chosen], padding=True, truncation=True, return_tensors="pt")
        hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
        means = (hidden * mask).sum(1) / mask.sum(1)
        for i, mean in zip(chosen, means, strict=True):
            rows[i] = mean
    return torch.stack(rows)


def embed_pairs(model: nn.Module, tokenizer: Any, pairs: Pairs) -> Tensor:
    """Return the embeddings of the first and of the second sentences, [2, pairs, hidden]."""
    _, first, second = zip(*pairs, strict=True)
    return torch.stack([embed(model, tokenizer, list(sentences)) for sentences in (first, second)])


def score_pairs(model: nn.Module, tokenizer: Any, pairs: Pairs, expected: Tensor | None = None) -> SimilarityScores:
    """Compare a model with the gold scores, and with the float model's `expected` embeddings of the same pairs."""
    found = embed_pairs(model, tokenizer, pairs)
    distance = None if expected is None else float((1 - cosine_similarity(found, expected, dim=-1)).mean())
    return SimilarityScores(correlation(found, pairs), distance)


def correlation(embeddings: Tensor, pairs: Pairs) -> float:
    """Return Spearman's correlation of the cosine similarity of embeddings [2, pairs, hidden] with the gold scores."""
    return float(spearmanr(cosine_similarity(*embeddings).numpy(), [pair[0] for pair in pairs]).statistic)
