"""The divergence of a quantized model from the float model, for language models and for encoders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.calibration.data import read_samples
from quantize.checkpoint.opening import open_checkpoint
from quantize.checkpoint.tokenizer import load_tokenize, load_tokenizer
from quantize.eval.perplexity import score_language
from quantize.eval.similarity import correlation, embed_pairs, read_pairs, score_pairs

BATCH = 16


class LanguageJudge:
    """Loss and divergence on fixed windows of a text.

    Attributes:
        reference: the float model.
        sample: one batch of inputs.
    """

    def __init__(self, model: Path, text: Path, window: int, windows: int) -> None:
        samples = read_samples(text, window, windows, load_tokenize(model), 2**31)
        self.batches = [batch["input_ids"] for batch in samples.batches(BATCH)]
        self.reference, self.sample = open_checkpoint(model).load(), {"input_ids": self.batches[0]}
        self.base = score_language(self.reference, self.batches).loss
        self.expected = Recorded(self.reference, self.batches)

    def scores(self, model: nn.Module) -> dict[str, float | None]:
        """Return `increase`, that of the loss in nats per token, and `kl`, the divergence from the float model."""
        found = score_language(model, self.batches, self.expected)
        return {"increase": found.loss - self.base, "kl": found.kl}


class Recorded(nn.Module):
    """A stand-in for a model that returns the outputs recorded for some batches."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, batches: Sequence[Tensor]) -> None:
        super().__init__()
        self.known = [(ids, model(input_ids=ids)) for ids in batches]

    def forward(self, input_ids: Tensor) -> Any:
        """Return the output recorded for one of the batches."""
        return next(output for ids, output in self.known if ids is input_ids)


class SentenceJudge:
    """Spearman correlation on scored pairs of sentences; the attributes are those of `LanguageJudge`."""

    def __init__(self, model: Path, pairs: Path) -> None:
        self.pairs, self.tokenizer = read_pairs(pairs), load_tokenizer(model)
        self.reference: nn.Module = open_checkpoint(model).load()
        tokens = self.tokenizer([first for _, first, _ in self.pairs[:BATCH]], padding=True, return_tensors="pt")
        self.sample: dict[str, Tensor] = dict(tokens)
        self.expected = embed_pairs(self.reference, self.tokenizer, self.pairs)
        self.base = correlation(self.expected, self.pairs)

    def scores(self, model: nn.Module) -> dict[str, Any]:
        """Return `retained`, the part left of the float model's correlation, and `distance`, that of embeddings."""
        found = score_pairs(model, self.tokenizer, self.pairs, self.expected)
        return {"retained": found.spearman / self.base, "distance": found.distance}
