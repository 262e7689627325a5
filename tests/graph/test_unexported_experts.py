"""Stacks of experts of a model that cannot be exported are rounded on the rows that its own code gives each."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional

from quantize.artifact.load import load
from quantize.checkpoint.opening import open_checkpoint
from quantize.graph.fallback.program import LinearsOnlyProgram, make_program
from quantize.graph.fallback.stacks import candidates
from quantize.nn.quantized_experts import QuantizedExperts
from quantize.pipeline.quantize import quantize_model


class Looping(nn.Module):
    """Each of three experts gets the rows of its tokens, of which none decides in Python whether it runs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.layers = nn.Embedding(32, 8), nn.ModuleList([Layer(), Layer()])
        self.score = nn.Linear(8, 32, bias=False)

    def forward(self, input_ids):
        x = self.words(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.score(x)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.chooser = nn.Conv1d(8, 8, 3, padding=1), nn.Linear(8, 3)
        self.rise, self.fall = (nn.Parameter(torch.randn(3, 6, 8) / 2) for _ in range(2))
        self.idle, self.scaled = nn.Parameter(torch.randn(3, 6, 8)), nn.Parameter(torch.randn(3, 6, 8))

    def forward(self, x):
        x = x + self.mix(x.transpose(1, 2)).transpose(1, 2) * self.scaled.mean()
        rows, y = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
        weights, chosen = self.chooser(rows).softmax(-1).max(-1)
        for e in range(3):
            mine = (chosen == e).nonzero()[:, 0]
            if len(mine) > 0:
                inner = functional.linear(rows[mine], self.rise[e]).relu()
                y[mine] = (inner @ self.fall[e]) * weights[mine, None]
        return x + y.view_as(x)


def test_stacks_are_found_by_what_the_model_multiplies():
    model = Looping()
    program = make_program(open_checkpoint(model), open_checkpoint(model).skeleton())
    assert isinstance(program, LinearsOnlyProgram)
    found = {x.path: x for x in program.all_linears if x.experts}
    assert found.keys() == {f"layers.{n}.{name}" for n in range(2) for name in ("rise", "fall")}
    assert [(x.experts, x.columns, x.transposed) for x in list(found.values())[:2]] == [(3, 8, False), (3, 6, True)]
    assert [segment.name for segment in program.segments[:2]] == ["layers.0", "layers.1"]
    names = [name for name, _ in program.model.module.named_parameters()]
    assert names == [name for name, _ in model.named_parameters()]  # the model is as it was
    assert len(candidates(program.model.module)) == 2 * 5


@pytest.mark.slow
def test_they_are_quantized_on_the_rows_of_each_expert_and_run(tmp_path):
    rows = torch.randint(32, (24, 8), generator=torch.Generator().manual_seed(1))
    text = tmp_path / "ids.jsonl"
    text.write_text("\n".join(json.dumps({"input_ids": row.tolist()}) for row in rows))
    settings = {"calibration": text, "nsamples": 24, "seqlen": 8, "group_size": 0}
    artifact = quantize_model(Looping(), output_dir=tmp_path / "out", scheme="W4A8", **settings)
    assert artifact.manifest["coverage"]["layers.1.fall"] == "quantized"
    assert artifact.manifest["coverage"]["layers.0.scaled"] != "quantized"
    tokens = artifact.manifest["expert_tokens"]["layers.0.rise"]
    assert sum(tokens) == artifact.manifest["calibration"]["tokens"] and len(tokens) == 3
    found, model = load(artifact.directory, skeleton=Looping()), Looping()
    assert isinstance(found.layers[0].rise, QuantizedExperts)
    with torch.no_grad():
        y, wanted = found(rows[:3]), model(rows[:3])
    assert float((y - wanted).norm() / wanted.norm()) < 0.2
