"""Random directions of the outputs weigh deviations as the loss does."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import kl_div

from quantize.pipeline.mixed_precision.sensitivity import cost, direction


def mean_cost(y, deviation, vocabulary):
    """The cost of a deviation of the outputs over many draws."""
    generator = torch.Generator().manual_seed(0)
    draws = [{"y": direction(y, vocabulary, generator)} for _ in range(20_000)]
    return cost({"y": deviation}, draws)


def test_logits_are_weighed_by_the_divergence():
    y = torch.tensor([[[2.0, 0.0, -1.0, 0.5], [0.0, 0.1, 3.0, -2.0]]])
    deviation = torch.tensor([[[0.01, -0.02, 0.03, 0.0], [0.02, 0.0, -0.01, 0.05]]])
    true = kl_div((y + deviation).log_softmax(-1), y.log_softmax(-1), log_target=True, reduction="sum")
    assert mean_cost(y, deviation, 4) == pytest.approx(float(true), rel=0.05)


def test_other_outputs_are_weighed_by_the_relative_error():
    y, deviation = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.3, -0.1]])
    assert mean_cost(y, deviation, 4) == pytest.approx(0.1 / 25, rel=0.05)
