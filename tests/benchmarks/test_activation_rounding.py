"""Activations are rounded behind rotations that change nothing by themselves."""

import torch

from benchmarks.activation_rounding import WIDTHS, rounded
from quantize.eval.loading import load_any

IDS = torch.arange(3, 67)[None]


@torch.no_grad()
def test_fewer_bits_are_further_from_the_float_model(stories):
    y = load_any(stories)(IDS).logits
    torch.testing.assert_close(rounded(stories, None)(IDS).logits, y, rtol=0, atol=1e-4)
    errors = [float((rounded(stories, args)(IDS).logits - y).norm()) for args in WIDTHS]
    assert errors[0] > 1e-3
    assert errors == sorted(errors)
