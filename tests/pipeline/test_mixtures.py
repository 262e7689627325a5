"""Tiny models of families of mixtures are quantized, loaded and run, with no table of their names."""

import json

import pytest
import torch
from helpers.mixtures import FAMILIES, build_family

from quantize.artifact.verify import verify_artifact
from quantize.nn.quantized_experts import QuantizedExperts
from quantize.pipeline.quantize import quantize_model

pytestmark = pytest.mark.slow
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
ONE_WAY = ("llama4_text",)  # whose class has no other implementation than its own


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_quantized_nearly_whole_and_runs(family, tmp_path):
    model = build_family(family)
    model.save_pretrained(tmp_path / "model")
    ids = torch.randint(2, 64, (96, 32), generator=torch.Generator().manual_seed(1))
    text = tmp_path / "ids.jsonl"
    text.write_text("\n".join(json.dumps({"input_ids": row.tolist()}) for row in ids))
    artifact = quantize_model(
        tmp_path / "model", output_dir=tmp_path / "out", scheme="W4A8", calibration=text, nsamples=96, seqlen=32
    )
    coverage, body = artifact.manifest["coverage"], dict(model.model.named_parameters(prefix="model"))
    sizes = {name: p.numel() for name, p in body.items() if "embed_tokens" not in name and p.dim() > 1}
    assert sum(n for name, n in sizes.items() if coverage[name] == "quantized") >= 0.97 * sum(sizes.values())
    held_out = artifact.manifest["held_out"]
    assert held_out["quantized"]["kl"] < held_out["plain_rounding"]["kl"]
    assert verify_artifact(tmp_path / "out")["difference"] < 1e-5

    found, prompt = artifact.load(), ids[:1, :8]
    experts = [module for module in found.modules() if isinstance(module, QuantizedExperts)]
    assert experts
    assert all(module.qweight.dtype == torch.uint8 for module in experts)
    texts = [found.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*texts)
    with torch.no_grad():
        logits, wanted = found(ids[:4]).logits, model(ids[:4]).logits
        assert float((logits - wanted).norm() / wanted.norm()) < 0.6
        for name in () if family in ONE_WAY else IMPLEMENTATIONS:  # whatever code of transformers multiplies
            found.set_experts_implementation(name)
            torch.testing.assert_close(found(ids[:4]).logits, logits)
