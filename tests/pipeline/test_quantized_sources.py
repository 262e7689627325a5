"""Models that are quantized already go through a whole run, and end nearer to their floats than by plain rounding."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import quantized_sources

import quantize
from quantize.pipeline.estimate.report import estimates, human, preflight
from quantize.pipeline.prepare import prepare
from quantize.pipeline.sequential import SequentialPipeline
from quantize.recipe.recipe import load_recipe

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": False, "group_size": 16}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
FLOAT = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
SOURCES = {
    "fp8": quantized_sources.fp8,
    "float-quantized": lambda d: quantized_sources.compressed(d, "float-quantized", **FLOAT),
    "int-quantized": lambda d: quantized_sources.compressed(d, "int-quantized", **INT8),
    "pack-quantized": lambda d: quantized_sources.compressed(d, "pack-quantized", **INT4),
    "nvfp4-pack-quantized": lambda d: quantized_sources.compressed(d, "nvfp4-pack-quantized", **NVFP4),
    "mxfp4": quantized_sources.mxfp4_experts,
    "gptq": quantized_sources.gptq,
    "awq": quantized_sources.awq,
    "modelopt": quantized_sources.modelopt,
    "gguf": quantized_sources.gguf_file,
}


@pytest.fixture(autouse=True)
def of_one_layer(monkeypatch):
    """Give every model one layer."""
    monkeypatch.setitem(quantized_sources.CONFIG, "num_hidden_layers", 1)


def require_nearer(artifact):
    """Check that outputs are nearer to the dequantized model's than plain rounding's, on rows held back.

    Plain rounding finds a grid again whose ends are in use; what is left is the error of tables in 8 bits.
    """
    scores = artifact.manifest["held_out"]
    assert scores["quantized"]["kl"] < max(scores["plain_rounding"]["kl"], 1e-4)


def size_of(directory):
    """Return the bytes of the weights."""
    return sum(path.stat().st_size for path in directory.glob("model.*"))


@pytest.mark.parametrize(
    ("name", "scheme"), [("fp8", "W4A16"), *(pytest.param(name, "W4A8", marks=pytest.mark.slow) for name in SOURCES)]
)
def test_a_run(tmp_path, name, scheme):
    directory = SOURCES[name](tmp_path / "model")
    ids = torch.randint(2, 64, (6, 32), generator=torch.Generator().manual_seed(0))
    artifact = quantize.quantize_model(
        directory, scheme=scheme, output_dir=tmp_path / "out", calibration=ids, seqlen=32, nsamples=6
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "quantize-model"
    require_nearer(artifact)
    assert artifact.manifest["float_bytes"] == size_of(tmp_path / "model")


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_what_a_dry_run_foresees_and_a_run_that_was_killed(tmp_path, monkeypatch, name):
    """A dry run reads headers alone, its bytes are the source's, and a killed run goes on to the same bytes."""
    model = SOURCES[name](tmp_path / "model")
    ids = torch.randint(2, 64, (6, 32), generator=torch.Generator().manual_seed(0))
    settings = {"scheme": "W4A16", "calibration": ids, "seqlen": 32, "nsamples": 6, "resume": True}
    foreseen = preflight(prepare(model, load_recipe("W4A16", None, seqlen=32, nsamples=6), ids, read=False))
    process, done = SequentialPipeline.process, []

    def killed(self, segment, arriving, file):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(segment.name)
        return process(self, segment, arriving, file)

    monkeypatch.setattr(SequentialPipeline, "process", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize.quantize_model(model, output_dir=tmp_path / "killed", **settings)
    assert (tmp_path / ".killed.partial").is_dir()
    monkeypatch.setattr(SequentialPipeline, "process", process)
    artifacts = [quantize.quantize_model(model, output_dir=tmp_path / n, **settings) for n in ("killed", "straight")]
    first, second = ({p.name: p.read_bytes() for p in a.directory.glob("model*")} for a in artifacts)
    assert first == second
    require_nearer(artifacts[1])
    assert artifacts[1].manifest["float_bytes"] == (source := size_of(tmp_path / "model"))
    assert next(estimates(foreseen, 0.0)).endswith(f" parameters in {human(source)}")
