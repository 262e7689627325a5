"""Forms in which people write models: transposed weights, tensors made in `forward`, loops over chunks of tokens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quantize import load
from quantize.checkpoint.meta_model import with_floats
from quantize.checkpoint.opening import open_checkpoint
from quantize.graph.export import export_program
from quantize.graph.fallback.program import LinearsOnlyProgram, make_program
from quantize.graph.interpreter import Overrides, run_nodes, start
from quantize.graph.linears import NOT_ALONE
from quantize.graph.program import Segment
from quantize.graph.weight_attributes import WeightAttributes
from quantize.pipeline.run_figures import hidden_state

IDS = torch.arange(3, 43).reshape(2, 20)


class Turned(nn.Linear):
    """Multiplies with the transpose of its weight, as Falcon does."""

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Model(nn.Module):
    def __init__(self, between):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head, self.between = nn.Embedding(512, 16), nn.Linear(16, 512), between
        self.up, self.down = Turned(16, 32), Turned(32, 16, bias=False)

    def forward(self, ids):
        x = self.table(ids)
        return self.head(x + self.down(torch.relu(self.up(self.between(x)))))


class Picks(nn.Module):
    """A list of indices becomes a tensor that no state holds."""

    def forward(self, x):
        return x + x[:, :, [-2, 3]].sum(-1, keepdim=True) * torch.tensor([0.5, 2.0]).sum()


class Mapped(nn.Module):
    """A mask is made by `torch.vmap`, as those of transformers that nobody knows to be made of indices."""

    def forward(self, x):
        places = torch.arange(x.shape[1], device=x.device)
        seen = torch.vmap(torch.vmap(lambda i, j: j <= i, (None, 0)), (0, None))(places, places)
        return x + seen.to(x.dtype) @ x


class Chosen(nn.Module):
    """Some tokens are taken out by their values, as Idefics3 does with images, and each writes into all."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return x + self.second(self.first(x[x[..., 0] > 0])).mean() * 0.1


class Chunks(nn.Module):
    """The number of chunks is a number of Python, which the exporter fixes."""

    def forward(self, x):
        return torch.cat([x[:, i * 8 : i * 8 + 8].cumsum(1) for i in range(-(-x.shape[1] // 8))], 1)


@torch.no_grad()
def output_of(program, model):
    values = start(program, IDS)
    for segment in program.segments:
        run_nodes(program, segment.nodes, values, Overrides(dict(model.named_parameters())))
    return values[program.output.all_input_nodes[0]]


@torch.no_grad()
@pytest.mark.parametrize("between", [nn.Identity, Picks, Mapped])
def test_a_product_with_a_transposed_weight_is_a_linear(between):
    program = export_program(Model(between()))
    found = {linear.path: (linear.bias, linear.transposed) for linear in program.all_linears}
    assert found == {"up": ("up.bias", False), "down": (None, False), "head": ("head.bias", False)}
    assert not program.not_replaceable
    model = Model(between())
    torch.testing.assert_close(output_of(program, model), model(IDS))


@torch.no_grad()
def test_such_linears_are_quantized(small_run):
    model = Model(Picks())
    artifact = small_run(model, "W8A8")
    assert {"up", "down"} <= artifact.manifest["quantization"]["modules"].keys()
    expected, found = model(IDS), load(artifact.directory, skeleton=Model(Picks()))(IDS)
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_values_whose_size_data_decide_are_no_hidden_state():
    program = export_program(Model(Chosen()))
    chosen = next(n for n in program.module.graph.nodes if n.target is torch.ops.aten.index.Tensor)
    last = next(n for n in program.module.graph.nodes if n.target is torch.ops.aten.linear.default)
    assert hidden_state(program, Segment("chosen", (chosen, last), ())) is None


@pytest.mark.parametrize(("length", "alone"), [(8, False), (20, True), (None, False)])
def test_a_graph_that_does_not_hold_for_the_length_is_given_up(length, alone):
    checkpoint = open_checkpoint(Model(Chunks()))
    program = make_program(checkpoint, checkpoint.skeleton(), length)
    assert isinstance(program, LinearsOnlyProgram) is alone
    assert ("its graph depends on the number of tokens, and does not run on 20" in program.export_error) is alone


def test_floats_that_json_has_no_word_for():
    config = {"limit": [0.0, {"__float__": "Infinity"}], "inner": {"low": {"__float__": "-Infinity"}, "a": {"b": 1}}}
    assert with_floats(config) == {
        "limit": [0.0, float("inf")],
        "inner": {"low": float("-inf"), "a": {"b": 1}},
    }


class Asks(nn.Module):
    """Asks something of a weight before it calls the linear."""

    def __init__(self, ask):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head, self.ask = nn.Embedding(512, 16), nn.Linear(16, 512), ask
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, ids):
        x = self.table(ids.to(self.table.weight.device))
        y = torch.relu(self.up(x))
        return self.head(x + self.ask(self.down, y))


def attributes(down, y):
    return down(y.to(down.weight.dtype).to(down.weight.device)[..., : down.weight.shape[1]])


def is_cast(down, y):
    same = not isinstance(down.weight, torch.Tensor) or y.dtype == down.weight.dtype
    return down(y if same else y.to(down.weight.dtype))


@torch.no_grad()
@pytest.mark.parametrize("ask", [attributes, is_cast])
def test_a_model_may_ask_for_the_dtype_and_the_device_of_a_weight(small_run, ask):
    artifact = small_run(Asks(ask), "W8A8")
    assert "down" in artifact.manifest["quantization"]["modules"]
    assert "table" in artifact.manifest["quantization"]["tables"]
    expected, found = Asks(ask)(IDS), load(artifact.directory, skeleton=Asks(ask))(IDS)
    assert float((found - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize(
    "ask",
    [
        lambda down, y: y @ down.weight.T,
        lambda down, y: down(y) + 0 * down.weight.sum(),
        lambda down, y: down(y) + 0 * torch.sum(down.weight),
        lambda down, y: down(y) + 0 * down.weight[0, 0],
    ],
)
def test_a_weight_whose_values_are_read_stays(ask):
    program = export_program(Asks(ask))
    assert "down" not in {linear.path for linear in program.all_linears}


def test_a_weight_without_values_says_so():
    weight = WeightAttributes(torch.float32, torch.device("cpu"), (2, 3))
    with pytest.raises(TypeError, match="the weight of a quantized linear has no values for linear"):
        nn.functional.linear(torch.zeros(3), weight)


@torch.no_grad()
def test_the_linears_of_an_encoder_layer_are_quantized(small_run):
    def build():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        return Model(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).eval()

    artifact = small_run(build(), "W8A8")
    modules = artifact.manifest["quantization"]["modules"].keys()
    assert {f"between.layers.{i}.linear{n}" for i in (0, 1) for n in (1, 2)} <= modules
    coverage = artifact.manifest["coverage"]
    assert coverage["between.layers.0.self_attn.in_proj_weight"] == NOT_ALONE
    expected, found = build()(IDS), load(artifact.directory, skeleton=build())(IDS)
    assert float((found - expected).norm() / expected.norm()) < 0.02
