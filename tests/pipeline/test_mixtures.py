"""Tiny models of families of mixtures are quantized, loaded and run, with no table of their names."""

import json

import pytest
import torch
from helpers.json_files import bytes_for_programs
from helpers.mixtures import FAMILIES, build_family

from quantize.artifact.verify import verify_artifact
from quantize.export.targets import formats
from quantize.nn.quantized_experts import QuantizedExperts
from quantize.pipeline.estimate.report import preflight
from quantize.pipeline.prepare import prepare
from quantize.pipeline.quantize import quantize_model
from quantize.recipe.recipe import load_recipe

pytestmark = pytest.mark.slow
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
ONE_WAY = ("llama4_text",)  # whose class has no other implementation than its own


ROWS = torch.randint(2, 64, (96, 32), generator=torch.Generator().manual_seed(1))


def data(directory):
    """Write calibration data, and return the arguments that say so."""
    text = directory / "ids.jsonl"
    text.write_text("\n".join(json.dumps({"input_ids": row.tolist()}) for row in ROWS))
    return {"calibration": text, "nsamples": len(ROWS), "seqlen": ROWS.shape[1]}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_quantized_nearly_whole_and_runs(family, tmp_path):
    model = build_family(family)
    model.save_pretrained(tmp_path / "model")
    artifact = quantize_model(tmp_path / "model", output_dir=tmp_path / "out", scheme="W4A8", **data(tmp_path))
    coverage, body = artifact.manifest["coverage"], dict(model.model.named_parameters(prefix="model"))
    sizes = {name: p.numel() for name, p in body.items() if "embed_tokens" not in name and p.dim() > 1}
    assert sum(n for name, n in sizes.items() if coverage[name] == "quantized") >= 0.97 * sum(sizes.values())
    held_out = artifact.manifest["held_out"]
    assert held_out["quantized"]["kl"] < held_out["plain_rounding"]["kl"]
    assert verify_artifact(tmp_path / "out")["difference"] < 1e-5

    found, prompt = artifact.load(), ROWS[:1, :8]
    experts = [module for module in found.modules() if isinstance(module, QuantizedExperts)]
    assert experts
    assert all(module.qweight.dtype == torch.uint8 for module in experts)
    texts = [found.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*texts)
    with torch.no_grad():
        logits, wanted = found(ROWS[:4]).logits, model(ROWS[:4]).logits
        assert float((logits - wanted).norm() / wanted.norm()) < 0.6
        for name in () if family in ONE_WAY else IMPLEMENTATIONS:  # whatever code of transformers multiplies
            found.set_experts_implementation(name)
            torch.testing.assert_close(found(ROWS[:4]).logits, logits)


@pytest.mark.parametrize(
    "changes",
    [
        {"prefix": {"tokens": [5]}},
        {"tune": {"steps": 4}},
        {"calibrate_all_experts": True},
        {"passes": [{"name": "rescale"}, {"name": "rotate"}, {"name": "noisy_bias"}]},
    ],
    ids=["prefix", "tune", "all", "bias"],
)
def test_what_a_recipe_may_ask_for_runs_with_experts(changes, tmp_path):
    model = build_family("mixtral")
    model.save_pretrained(tmp_path / "model")
    artifact = quantize_model(
        tmp_path / "model", output_dir=tmp_path / "out", scheme="W4A8", recipe=changes, **data(tmp_path)
    )
    assert verify_artifact(tmp_path / "out")["difference"] < 1e-5
    ids = torch.arange(2, 34)[None]
    with torch.no_grad():
        logits, wanted = artifact.load()(ids).logits, model(ids).logits
    if "prefix" not in changes:  # which changes what the float model says
        assert float((logits - wanted).norm() / wanted.norm()) < 0.6
    texts = [artifact.load().generate(ids, max_new_tokens=4, do_sample=False, use_cache=c) for c in (True, False)]
    assert torch.equal(*texts)


def test_an_artifact_is_as_large_as_forecast(tmp_path):
    build_family("gpt_oss").save_pretrained(tmp_path / "model")
    settings = data(tmp_path)
    text = settings.pop("calibration")
    prepared = prepare(tmp_path / "model", load_recipe("W4A8", None, **settings), text)
    found = preflight(prepared)
    assert not formats(found)["safetensors-float"]
    artifact = quantize_model(
        tmp_path / "model", output_dir=tmp_path / "out", scheme="W4A8", calibration=text, **settings
    )
    assert json.loads(json.dumps(found.settings)) == artifact.manifest["quantization"]
    assert found.artifact_bytes() == pytest.approx(bytes_for_programs(artifact), rel=0.02)
