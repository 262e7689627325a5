"""The small ViT of `make bench-vit`: its data, and its scores."""

import pytest
import torch
from torch import nn

from benchmarks.vit import digits, scores


class Linear(nn.Module):
    def __init__(self, W):
        super().__init__()
        self.W = W

    def forward(self, pixel_values):
        return type("Output", (), {"logits": pixel_values.flatten(1) @ self.W})


def test_digits_are_the_same_for_every_call():
    images, labels = digits()
    assert (images.shape, labels.shape) == ((1797, 1, 8, 8), (1797,))
    assert (float(images.min()), float(images.max())) == (-1.0, 1.0)
    assert torch.equal(labels, digits()[1])
    assert labels[:400].unique().tolist() == list(range(10))


def test_scores_by_hand():
    images = torch.eye(2).reshape(2, 1, 1, 2)
    model, other = Linear(torch.tensor([[0.0, 9.0], [9.0, 0.0]])), Linear(torch.zeros(2, 2))
    assert scores(model, model, images, torch.tensor([1, 1])) == (0.5, pytest.approx(0.0, abs=1e-7))
    accuracy, kl = scores(other, model, images, torch.tensor([0, 0]))
    assert accuracy == 1.0
    assert kl == pytest.approx(torch.tensor(2.0).log().item(), abs=2e-3)  # of a sure answer against an even one
