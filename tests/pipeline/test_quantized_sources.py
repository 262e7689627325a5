"""Models that are quantized already go through a whole run, and end nearer to their floats than by plain rounding."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import quantized_sources

import quantize

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": False, "group_size": 16}


@pytest.mark.parametrize(
    ("make", "scheme"),
    [
        pytest.param(quantized_sources.fp8, "W4A16", id="fp8"),
        pytest.param(quantized_sources.mxfp4_experts, "W4A8", id="mxfp4", marks=pytest.mark.slow),
        pytest.param(
            lambda d: quantized_sources.compressed(d, "pack-quantized", **INT4),
            "W4A8", id="compressed-tensors", marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_a_run(tmp_path, make, scheme):
    directory = make(tmp_path / "model")
    ids = torch.randint(2, 64, (6, 32), generator=torch.Generator().manual_seed(0))
    artifact = quantize.quantize_model(
        directory, scheme=scheme, output_dir=tmp_path / "out", calibration=ids, seqlen=32, nsamples=6
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "quantize-model"
    scores = artifact.manifest["held_out"]
    assert scores["quantized"]["kl"] < scores["plain_rounding"]["kl"]
    assert artifact.manifest["float_bytes"] == (directory / "model.safetensors").stat().st_size
