"""A stack of weights is a linear for each expert where the graph shows a product with all of them."""

import json

import pytest
import torch
import transformers
from helpers.mixtures import Mixture
from helpers.soundness import CONFIGS
from torch import nn

from quantize.artifact.verify import verify_artifact
from quantize.checkpoint.meta_model import build_skeleton
from quantize.checkpoint.opening import open_checkpoint
from quantize.graph.export import export_program
from quantize.graph.linears import NOT_ALONE, STACK, STACK_READ
from quantize.pipeline.quantize import quantize_model


def experts_of(model):
    program = export_program(model)
    return program, {x.path: x for x in program.all_linears if x.experts}


def test_a_grouped_product_is_a_linear_for_each_expert():
    program, found = experts_of(build_skeleton(json.loads(CONFIGS["mixtral"].read_text())))
    up = found["model.layers.0.mlp.experts.gate_up_proj"]
    assert len(found) == 4
    assert (up.experts, up.columns, up.transposed, up.bias) == (4, 32, False, None)
    W = torch.randn(4, 96, 32)
    assert torch.equal(up.as_out_in(W), W.flatten(0, 1))
    assert torch.equal(up.as_out_in(up.as_out_in(W)), W)
    assert up.operands == (up.source, up.offsets)
    down = found["model.layers.0.mlp.experts.down_proj"]
    assert down.offsets is up.offsets
    assert program.gathers_tokens(up)
    assert not program.gathers_tokens(down)


def test_stacks_stored_as_in_by_out_are_turned():
    _, found = experts_of(Mixture())
    assert (found["rise"].transposed, found["fall"].transposed) == (False, True)
    assert (found["rise"].columns, found["fall"].columns) == (16, 24)
    W = torch.randn(4, 24, 16)
    assert torch.equal(found["fall"].as_out_in(W), torch.cat([expert.T for expert in W]))
    assert torch.equal(found["fall"].as_out_in(found["fall"].as_out_in(W)), W)


def test_other_stacks_and_linears_that_choose_experts_are_told_apart():
    program, _ = experts_of(Mixture())
    assert program.not_replaceable == {"mix.weight": STACK}
    assert program.routers == {"chooser"}


def test_what_follows_the_choice_or_lies_behind_a_product_is_no_router():
    program = export_program(build_skeleton(json.loads(CONFIGS["mixtral"].read_text())))
    assert not program.routers  # the router's module computes more than its product
    assert program.not_replaceable["model.layers.0.mlp.gate.weight"] == NOT_ALONE


class Batched(nn.Module):
    """All tokens go through each of three experts; the weights of one are read once more if `twice`."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.twice, self.words, self.stack = twice, nn.Embedding(16, 8), nn.Parameter(torch.randn(3, 8, 6))

    def forward(self, input_ids):
        x = self.words(input_ids).flatten(0, 1)
        y = torch.bmm(x.expand(3, -1, -1), self.stack).sum(0)
        return (y + x @ self.stack[0] if self.twice else y).unflatten(0, input_ids.shape)


def test_a_batched_product_is_a_linear_for_each_expert_if_nothing_else_reads_the_stack():
    _, found = experts_of(Batched(twice=False))
    assert (found["stack"].experts, found["stack"].columns, found["stack"].offsets) == (3, 8, None)
    program, found = experts_of(Batched(twice=True))
    assert not found
    assert program.not_replaceable == {"stack": STACK_READ}


@pytest.mark.slow
def test_experts_are_quantized_and_follow_the_rotation(tmp_path):
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
    coverage = artifact.manifest["coverage"]
    assert coverage["model.layers.0.mlp.experts.down_proj"] == "quantized"
    assert max(artifact.manifest["gate"]["passes"]["learned_rotation"].values()) < 1e-5
    found, was = artifact.load().model.layers[0].mlp.experts.down_proj, model.model.layers[0].mlp.experts.down_proj
    moved = found.qtensor().dequantize().view_as(was) - was
    assert float(moved.detach().norm() / was.detach().norm()) > 0.5
    with torch.no_grad():
        expected, found = model(ids).logits, artifact.load()(ids).logits
    assert float((found - expected).norm() / expected.norm()) < 0.15
    assert verify_artifact(out)["difference"] < 1e-5
