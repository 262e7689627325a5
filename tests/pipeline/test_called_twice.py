"""A linear that runs several times has one weight, which is rounded once, on the inputs of all its calls."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from quantize import load
from quantize.artifact.verify import verify_artifact
from quantize.calibration.runner import SequentialRunner
from quantize.graph.export import export_program
from quantize.graph.interpreter import Overrides
from quantize.quantizers.gptq import GPTQ

IDS = torch.arange(3, 43).reshape(2, 20)


class Block(nn.Module):
    """One projection makes queries and keys, and both are gated, each twice."""

    def __init__(self):
        super().__init__()
        self.norm, self.query, self.gate, self.value, self.out = (
            nn.LayerNorm(16),
            *(nn.Linear(16, 16) for _ in "1234"),
        )

    def forward(self, x):
        y = self.norm(x)
        queries, keys = (self.query(z) * self.gate(z).sigmoid() for z in (y, y.flip(1)))
        attended = functional.scaled_dot_product_attention(queries, keys, self.value(y))
        return x + self.out(torch.relu(attended))


class Model(nn.Module):
    def __init__(self, order):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head, blocks = nn.Embedding(512, 16), nn.Linear(16, 512), [Block() for _ in set(order)]
        self.blocks = nn.ModuleList(blocks[i] for i in order)

    def forward(self, ids):
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


ORDERS = [(0,), (0, 0, 0), (0, 1, 0), (0, 1, 2, 1)]


def paths_of(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("order", ORDERS)
def test_the_inputs_of_all_calls_are_those_of_the_model(order):
    model = Model(order).eval()
    seen = {path: [] for path in paths_of(model)}
    for path, module in paths_of(model).items():
        module.register_forward_pre_hook(lambda _, x, path=path: seen[path].append(x[0]))
    with torch.no_grad():
        model(IDS)
    state, program = Overrides(dict(model.named_parameters())), export_program(Model(order))
    runner = SequentialRunner(program, [IDS])
    for segment in program.segments:
        for sharing in runner.advance_to_linears(segment, state, program.linears(segment)):
            for linear in sharing:
                found = list(runner.inputs(segment, linear, state))
                torch.testing.assert_close(found, seen.pop(linear.path), rtol=0, atol=1e-6)
    assert not seen


@pytest.mark.parametrize("order", ORDERS)
def test_each_weight_is_rounded_once(small_run, monkeypatch, order):
    rounded, quantize_weights = Counter(), GPTQ.quantize_weights

    def counted(self, weights, *args):
        rounded.update([len(weights)])
        return quantize_weights(self, weights, *args)

    monkeypatch.setattr(GPTQ, "quantize_weights", counted)
    artifact = small_run(Model(order), "W8A8", recipe={"quantizer": {"name": "gptq"}, "ignore": ["head"]})
    inner = 4 * len(set(order))
    assert sum(size * count for size, count in rounded.items()) == inner
    assert len(artifact.manifest["quantization"]["modules"]) == inner
    assert not artifact.manifest["untied"]
    loaded = load(artifact.directory, skeleton=Model(order))
    with torch.no_grad():
        expected, found = Model(order)(IDS), loaded(IDS)
    assert float((found - expected).norm() / expected.norm()) < 0.05


SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512,
    "max_position_embeddings": 80, "embedding_size": 16,
}  # fmt: skip
RELATIVE = {
    "relative_attention": True, "position_buckets": 16, "share_att_key": True, "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False, "max_relative_positions": -1,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("family", "more"), [("Albert", {}), ("DebertaV2", RELATIVE)])
def test_models_of_transformers_that_call_a_linear_twice(small_run, tmp_path, family, more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **more)
    model = getattr(transformers, f"{family}Model")(config).eval()
    model.save_pretrained(tmp_path / "model")
    artifact = small_run(tmp_path / "model", "W8A8")
    assert verify_artifact(artifact.directory)["difference"] < 1e-5
    with torch.no_grad():
        expected, found = model(IDS)[0], artifact.load()(IDS)[0]
    assert float((found - expected).norm() / expected.norm()) < 0.05
