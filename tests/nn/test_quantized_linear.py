"""Which products are linears, by how they are written and never by their class; weights stored as [in, out]."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from quantize import load
from quantize.artifact.verify import verify_artifact
from quantize.calibration.statistics import Absmax, Rows
from quantize.errors import UsageError
from quantize.export.directory import export_artifact
from quantize.graph.allowed_transforms import AllowedTransforms
from quantize.graph.basis import Basis, Edge
from quantize.graph.export import export_program
from quantize.graph.linears import MORE_VALUES, NOT_ALONE, READ_ITSELF
from quantize.kernels.hadamard import hadamard_transform
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.passes import PASSES
from quantize.passes.base import BasisContext
from quantize.pipeline.block import Block
from quantize.pipeline.quantize import quantize_model
from quantize.scheme.scheme import Scheme, WeightArgs
from quantize.transforms.fold import Diagonal
from quantize.transforms.online import Hadamard, InputTransform

GPT2 = GPT2Config(vocab_size=64, n_embd=24, n_layer=2, n_head=3, n_positions=32, n_inner=40)
IDS = torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(1))
RTN = {"passes": [], "quantizer": {"name": "rtn"}}


class Stored(nn.Module):
    """A weight [6, 4] and, under a name of its own, a bias [4]; subclasses multiply with them."""

    def __init__(self):
        super().__init__()
        self.matrix, self.shift = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4))

    def product(self, x):
        return torch.addmm(self.shift, x.reshape(-1, 6), self.matrix)

    def forward(self, x):
        return self.product(x).view(*x.shape[:-1], 4)


class Bare(Stored):
    def __init__(self):
        super().__init__()
        del self.shift

    def forward(self, x):
        return x @ self.matrix


class Flat(Bare):
    def forward(self, x):
        return torch.mm(x.flatten(0, 1), self.matrix).unflatten(0, x.shape[:2])


class Doubled(Stored):
    def forward(self, x):
        return 2 * super().forward(x)


class Normed(Stored):
    def forward(self, x):
        return super().forward(nn.functional.normalize(x, dim=-1))


class WithChild(Stored):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


class WithGain(Stored):
    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.ones(4))


class Regrouped(Stored):
    def forward(self, x):
        return self.product(x).view(x.shape[0], -1, 2).repeat(1, 1, 2)


class Halves(Stored):
    def forward(self, x):
        return self.product(x).view(-1, 1, 4)


class Scaled(Stored):
    def product(self, x):
        return torch.addmm(self.shift, x.reshape(-1, 6), self.matrix, alpha=2)


class Other(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


class Paired(Stored):
    """What it returns beside its product leaves no trace in the graph (I-BERT, Megatron's linears)."""

    def forward(self, x, scale=None):
        return super().forward(x), scale


class Model(nn.Module):
    """Tokens, one block that holds the module in question, and a head."""

    def __init__(self, part, call=lambda model, x: model.blocks[0](x), width=6):
        super().__init__()
        self.table, self.blocks, self.head = nn.Embedding(512, width), nn.ModuleList([part]), nn.Linear(4, 64)
        self.call = call

    def forward(self, tokens):
        return self.head(self.call(self, self.table(tokens)))


def with_weight(model, x):
    return model.blocks[0](x) + model.blocks[0].matrix.sum()


def weight_alone(model, x):
    return x @ model.blocks[0].matrix


def attention(model, x):
    return model.blocks[0](x, x, x, need_weights=False)[0]


def analysed(model):
    program = export_program(model.to("meta"))
    return program, {linear.path: linear for segment in program.segments for linear in program.linears(segment)}


@pytest.mark.parametrize("part", [Stored, Bare, Flat, lambda: nn.Linear(6, 4)])
def test_a_module_that_is_one_product_is_a_linear(part):
    program, found = analysed(Model(part()))
    assert list(found) == ["blocks.0", "head"]
    linear = found["blocks.0"]
    assert linear.columns == 6
    assert linear.weight in ("blocks.0.matrix", "blocks.0.weight")
    assert linear.bias in ("blocks.0.shift", "blocks.0.bias", None)
    assert linear.as_out_in(torch.empty(program_shape(program, linear.weight))).shape == (4, 6)
    assert not program.not_replaceable


def program_shape(program, name):
    return next(tuple(node.meta["val"].shape) for node, found in program.parameters.items() if found == name)


@pytest.mark.parametrize(
    ("part", "call"),
    [
        (Doubled, None),
        (Normed, None),
        (WithChild, None),
        (WithGain, None),
        (Regrouped, None),
        (lambda: Other(6, 4), None),
        (Stored, with_weight),
        (Bare, weight_alone),
    ],
)
def test_a_module_that_computes_more_is_none(part, call):
    program, found = analysed(Model(part(), *([call] if call else [])))
    assert list(found) == ["head"]
    (weight,) = program.not_replaceable
    assert program.not_replaceable[weight] == NOT_ALONE
    assert weight in ("blocks.0.matrix", "blocks.0.weight")


def test_a_weight_that_is_looked_at_elsewhere_stays():
    """Only its dtype is asked for, which leaves no trace in the graph."""
    model = Model(Stored(), lambda model, x: model.blocks[0](x.to(model.blocks[0].matrix.dtype)))
    program, found = analysed(model)
    assert list(found) == ["head"]
    assert program.not_replaceable == {"blocks.0.matrix": READ_ITSELF}
    assert type(model.blocks[0]) is Stored
    sizes = Model(nn.Linear(6, 4), lambda model, x: model.blocks[0](x)[..., : model.blocks[0].out_features])
    assert list(analysed(sizes)[1]) == ["blocks.0", "head"]


@pytest.mark.parametrize(
    ("part", "call"),
    [
        (Paired, lambda model, x: model.blocks[0](x)[0]),
        (Paired, lambda model, x: model.blocks[0](x, None)[0]),
        (lambda: nn.Linear(6, 4), lambda model, x: model.blocks[0](input=x)),
    ],
)
def test_a_module_that_takes_or_returns_more_than_one_tensor_stays(part, call):
    program, found = analysed(Model(part(), call))
    assert list(found) == ["head"]
    assert list(program.not_replaceable.values()) == [MORE_VALUES]


def test_a_product_that_arranges_its_rows_anew_is_none():
    program, found = analysed(Model(Halves(), lambda model, x: model.blocks[0](x)[None]))
    assert "blocks.0" not in found
    assert list(program.not_replaceable) == ["blocks.0.matrix"]


def test_a_scaled_product_is_none():
    assert "blocks.0" not in analysed(Model(Scaled()))[1]


def test_a_module_that_is_called_twice_is_one_linear_of_two_calls():
    model = Model(Stored(), lambda model, x: model.blocks[0](x) + model.blocks[0](2 * x))
    program = export_program(model.to("meta"))
    assert [(linear.path, len(linear.calls)) for linear in program.all_linears] == [("blocks.0", 2), ("head", 1)]


def test_weights_that_another_module_multiplies_with_stay(small_run):
    """`nn.MultiheadAttention` reads the weight of its output projection, and holds the others itself."""
    model = Model(nn.MultiheadAttention(4, 2, batch_first=True), attention, width=4)
    artifact = small_run(model, "W8A8", recipe=RTN)
    coverage = artifact.manifest["coverage"]
    assert coverage["head.weight"] == "quantized"
    assert coverage["blocks.0.in_proj_weight"] == coverage["blocks.0.out_proj.weight"] == NOT_ALONE
    loaded = load(artifact.directory, skeleton=Model(nn.MultiheadAttention(4, 2, batch_first=True), attention, width=4))
    assert relative(loaded, model) < 0.02


@torch.no_grad()
def relative(model, reference, ids=IDS):
    found, expected = (getattr(y, "logits", y) for y in (model.eval()(ids), reference.eval()(ids)))
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("part", [Stored, Bare, Flat])
def test_rows_and_columns_are_not_mixed_up(small_run, part):
    """Integers on the grid of their output channel, so that rounding to nearest must find them again."""
    torch.manual_seed(0)
    model = Model(part())
    with torch.no_grad():
        weight = torch.tensor(
            [[127, 1, 2, -3], [4, -127, 5, 6], [7, 8, 127, 9], [0, 1, 2, 127], [3, 4, 5, 6], [7, 8, 9, 0.0]]
        )
        model.blocks[0].matrix.copy_(weight * torch.tensor([1.0, 0.5, 2.0, 0.25]))
    artifact = small_run(model, "W8A8", recipe=RTN)
    assert artifact.manifest["coverage"]["blocks.0.matrix"] == "quantized"
    loaded = load(artifact.directory, skeleton=Model(part()))
    layer = loaded.blocks[0]
    assert isinstance(layer, QuantizedLinear)
    assert (layer.in_features, layer.out_features) == (6, 4)
    assert layer.qweight.tolist() == weight.T.int().tolist()
    assert layer.scale[:, 0].tolist() == [1.0, 0.5, 2.0, 0.25]
    if part is Stored:
        torch.testing.assert_close(layer.bias, model.blocks[0].shift.detach(), rtol=0, atol=0)
    assert relative(loaded, model) < 0.02


def test_the_group_size_must_divide_the_inputs(small_run):
    with pytest.raises(UsageError, match=r"the group size 4 does not divide the 6 columns of blocks\.0;"):
        small_run(Model(Stored()), "W4A16", group_size=4, recipe=RTN)


def test_a_rotated_weight_stays_as_it_is_stored():
    found = analysed(Model(Stored()))[1]
    linear, rotation = found["blocks.0"], InputTransform((Hadamard(2, 3),))
    rng = torch.Generator().manual_seed(0)
    weights = {"blocks.0.matrix": torch.randn(6, 4, generator=rng), "blocks.0.shift": torch.randn(4, generator=rng)}
    plain = Block(None, (linear,), weights, {}, {}, {linear: InputTransform()})
    block = plain.with_input_transforms({linear: rotation})
    rotated = block.weights["blocks.0.matrix"]
    assert rotated.shape == (6, 4)
    torch.testing.assert_close(rotated.T, hadamard_transform(weights["blocks.0.matrix"].T.contiguous(), 2, 3))
    x = torch.randn(5, 6, generator=rng)
    run = block.overrides().linears[linear.node]
    torch.testing.assert_close(run(x), x @ weights["blocks.0.matrix"] + weights["blocks.0.shift"])


def test_smoothquant_takes_the_columns_of_a_transposed_weight():
    """As `test_smoothquant_by_hand`, the weight [K, N] = [2, 3]: the columns are its rows."""
    reader = Edge("a.matrix", 0, torch.arange(2)[None])
    site = Basis(
        0, 2, 1, AllowedTransforms.LINEAR, (Edge("norm", 0, torch.arange(2)[None], vector=True),), (reader,), ()
    )
    weights, seen = (
        {"a.matrix": torch.tensor([[1 / 16, 0.0, -1 / 32], [0.5, 1.0, 0.0]])},
        Rows(absmax=Absmax(torch.tensor([16.0, 1.0]))),
    )
    scheme = Scheme(weights=WeightArgs(num_bits=8))
    transform = PASSES["smoothquant"](alpha=0.75).transform(
        BasisContext(site, {"a.matrix": seen}, weights, {"a.matrix": scheme}, torch.Generator())
    )
    assert isinstance(transform, Diagonal)
    assert torch.allclose(1 / transform.d, torch.tensor([16.0, 1.0], dtype=torch.float64))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A random GPT-2 whose gains and biases matter, and rows of ids."""
    directory = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter.dim() == 1) * parameter + 0.3 * torch.randn_like(parameter))
    model.save_pretrained(directory / "model")
    rows = torch.randint(64, (16, 32)).tolist()
    (directory / "rows.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return directory


@pytest.fixture(scope="module")
def quantized(gpt2):
    """Artifacts of all of it by scheme."""
    settings = {"calibration": gpt2 / "rows.jsonl", "group_size": 0, "nsamples": 16, "seqlen": 32}
    recipes = {"W8A8": "w8a8", "W4A4": "w4a4-folded"}
    return {s: quantize_model(gpt2 / "model", output_dir=gpt2 / s, recipe=r, **settings) for s, r in recipes.items()}


def test_gpt2_end_to_end(gpt2, quantized):
    reference, distance = GPT2LMHeadModel.from_pretrained(gpt2 / "model"), {}
    for scheme, artifact in quantized.items():
        loaded = load(artifact.directory)
        assert sum(isinstance(layer, QuantizedLinear) for layer in loaded.modules()) == 2 * 4 + (scheme == "W4A4")
        assert loaded.transformer.h[0].mlp.c_proj.in_features == 40
        assert verify_artifact(artifact.directory)["difference"] < 1e-5
        distance[scheme] = relative(loaded, reference)
        prompt = {"input_ids": IDS[:, :4], "attention_mask": torch.ones_like(IDS[:, :4])}
        assert loaded.generate(**prompt, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (4, 7)
    assert 0 < distance["W8A8"] < 0.03
    assert distance["W8A8"] < distance["W4A4"] < 0.4


def test_the_vocabulary_is_found_behind_views():
    assert export_program(GPT2LMHeadModel(GPT2).to("meta")).vocabulary == 64


def test_every_weight_of_gpt2_is_accounted_for(quantized):
    coverage = quantized["W4A4"].manifest["coverage"]
    done = {name for name, how in coverage.items() if how == "quantized"}
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    linears = {f"transformer.h.{i}.{part}.weight" for i in range(2) for part in parts}
    assert done == {*linears, "lm_head.weight", "transformer.wte.weight"}  # rotation unties them
    assert quantized["W8A8"].manifest["coverage"]["lm_head.weight"] == "ignored by 'lm_head'"


@pytest.mark.slow
def test_gpt2_is_exported(quantized, tmp_path):
    found = export_artifact(quantized["W4A4"].directory, "onnx", tmp_path / "onnx")
    assert found["emulation"] < 1e-4 < found["activations"]


def test_a_bias_that_is_tied_is_stored_for_both(small_run):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1}
    model = BertForMaskedLM(BertConfig(vocab_size=512, max_position_embeddings=64, **sizes))
    torch.nn.init.normal_(model.cls.predictions.bias)
    artifact = small_run(model, "W8A8", recipe={**RTN, "ignore": []})
    loaded = load(artifact.directory)
    assert artifact.manifest["export"]["exported"]
    assert isinstance(loaded.cls.predictions.decoder, QuantizedLinear)
    for bias in (loaded.cls.predictions.decoder.bias, loaded.cls.predictions.bias):
        torch.testing.assert_close(bias, model.cls.predictions.bias, check_device=True)
    assert relative(loaded, model) < 0.02
