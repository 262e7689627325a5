"""The masked likelihood of a masked-diffusion language model on fixed windows (arXiv 2502.09992)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from quantize.calibration.logits import Divergence
from quantize.calibration.masking import masked_places
from quantize.eval.perplexity import LanguageScores, compare
from quantize.graph.export import forward_switches

PARTS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of a window's tokens that are masked, each part once


@torch.no_grad()
def score_masked(
    model: nn.Module, batches: Sequence[Tensor], mask_id: int, against: nn.Module | None = None
) -> LanguageScores:
    """Score windows of token ids, each batch [B, T]; what is masked is predicted, and the same is masked every time.

    Args:
        model: a model that returns `logits` [B, T, V] for each token itself.
        batches: the token ids of the fixed slice.
        mask_id: the token that stands for one to find.
        against: the float model; None leaves divergence out.
    """
    total, rng = Divergence(), np.random.default_rng(0)
    for ids in batches:
        for part in PARTS:
            places = torch.stack([masked_places(ids.shape[1], part, rng) for _ in ids])
            given = torch.where(places, mask_id, ids)
            found = [
                each(input_ids=given, **forward_switches(each)).logits[places].float()
                for each in (model, against)
                if each is not None
            ]
            total += compare(ids[places], *found)
    if against is None:
        return LanguageScores(total.mean("loss"), total.tokens)
    means = (total.mean(name) for name in ("kl", "top1", "reference_loss"))
    return LanguageScores(total.mean("loss"), total.tokens, *means)
