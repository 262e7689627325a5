"""A value that is carried from block to block has one layout, in the run and in the check of what was written."""

from __future__ import annotations

import torch
from transformers import ConvNextConfig, ConvNextForImageClassification

SIZES = {"image_size": 64, "patch_size": 4, "num_stages": 2, "hidden_sizes": [32, 64], "depths": [1, 1]}


def test_a_convolution_reads_the_same_layout_when_it_is_read_back(small_run):
    torch.manual_seed(0)
    model = ConvNextForImageClassification(ConvNextConfig(**SIZES)).eval()
    images = torch.randn(4, 3, 64, 64)
    artifact = small_run(model, "W4A4", calibration=images)
    assert artifact.manifest["parity"]["reloaded"] == 0
