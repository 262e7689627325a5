"""Sentence similarity: how well an encoder ranks pairs of sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from quantize.errors import UsageError

BATCH = 64


def read_pairs(path: Path) -> list[tuple[float, str, str]]:
    """Rows of `score <tab> sentence <tab> sentence`; rows without a score are skipped (STS gold files).

    Raises:
        UsageError: no such file, or no scored pair in it.
    """
    if not path.is_file():
        raise UsageError(f"no such text file: {path}")
    try:
        rows = [line.split("\t") for line in path.read_text().splitlines()]
        pairs = [(float(row[0]), row[1], row[2]) for row in rows if len(row) >= 3 and row[0].strip()]
    except ValueError:
        raise UsageError(f"{path} holds a score that is no number, or is not UTF-8 text") from None
    if len(pairs) < 2:
        raise UsageError(f"{path} holds fewer than two rows of score, sentence and sentence, separated by tabs")
    return pairs


@torch.no_grad()
def embed(model: nn.Module, tokenizer: Any, sentences: list[str]) -> Tensor:
    """Mean of the last hidden states over the tokens of each sentence, [sentences, hidden].

    Sentences run by length, so that a batch holds little padding.
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


def score_pairs(model: nn.Module, tokenizer: Any, pairs: list[tuple[float, str, str]]) -> float:
    """Spearman correlation of cosine similarity with the gold scores, in [-1, 1]."""
    scores, first, second = zip(*pairs, strict=True)
    similarity = cosine_similarity(embed(model, tokenizer, list(first)), embed(model, tokenizer, list(second)))
    return float(spearmanr(similarity.numpy(), scores).statistic)
