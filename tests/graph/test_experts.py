"""A mixture of experts from a directory, where each expert has tensors of its own."""

import json

import pytest
import torch
import transformers
from helpers.soundness import CONFIGS

from quantize.artifact.verify import verify_artifact
from quantize.checkpoint.checkpoint import open_checkpoint
from quantize.graph.linears import STACK
from quantize.pipeline.quantize import quantize_model


@pytest.mark.slow
def test_experts_stay_in_float_and_follow_the_rotation(tmp_path):
    config = json.loads(CONFIGS["mixtral"].read_text()) | {"num_hidden_layers": 1}
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig.from_dict(config)).eval()
    model.save_pretrained(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    assert len(checkpoint.sources["model.layers.0.mlp.experts.gate_up_proj"].names) == 2 * 4
    for name, parameter in model.named_parameters():
        assert torch.equal(checkpoint.tensor(name), parameter), name

    ids = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(0))
    text = tmp_path / "ids.jsonl"
    text.write_text("\n".join(json.dumps({"input_ids": row.tolist()}) for row in ids))
    out = tmp_path / "out"
    artifact = quantize_model(
        tmp_path / "model", output_dir=out, recipe="w4a4-folded", calibration=text, group_size=0, seqlen=16
    )
    assert artifact.manifest["coverage"]["model.layers.0.mlp.experts.down_proj"] == STACK
    assert max(artifact.manifest["gate"]["passes"]["learned_rotation"].values()) < 1e-5
    moved = artifact.load().model.layers[0].mlp.experts.down_proj - model.model.layers[0].mlp.experts.down_proj
    assert float(moved.detach().abs().max()) > 0.01
    with torch.no_grad():
        expected, found = model(ids).logits, artifact.load()(ids).logits
    assert float((found - expected).norm() / expected.norm()) < 0.15
    assert verify_artifact(out)["difference"] < 1e-5
