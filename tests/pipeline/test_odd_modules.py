"""Linears in other forms than `nn.Linear` are quantized, or it is said what is there."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
from rich.console import Console

from benchmarks.families.modules import MODULES, stack
from quantize import load
from quantize.errors import QuantizeError, UsageError
from quantize.export.directory import export_artifact
from quantize.pipeline.quantize import quantize_model

IDS = torch.arange(3, 103).reshape(4, 25)
PLAIN = {"passes": [], "quantizer": {"name": "rtn"}}


def share(artifact):
    body = artifact.manifest["body"]
    return body["quantized"] / body["parameters"]


@torch.no_grad()
def distance(model, other):
    return float((model(IDS) - other(IDS)).norm() / other(IDS).norm())


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "x @ W", "einsum"])
def test_weights_that_are_computed_or_parameters_are_quantized(small_run, name):
    model = MODULES[name]()
    artifact = small_run(model, "W8A8", recipe=PLAIN, calibration=list(IDS))
    assert share(artifact) > (0.969 if name == "einsum" else 0.97)  # gains and biases are 3 % of so small a model
    inner = "blocks.0.inner.weight" if name == "einsum" else "blocks.0.inner"  # a weight of each head is a stack
    assert inner in artifact.manifest["quantization"]["modules"]
    loaded = load(artifact.directory, skeleton=MODULES[name]())
    assert 0 < distance(loaded, model) < 0.02
    assert distance(artifact.load(), loaded) == 0
    assert name != "weight_norm" or hasattr(model.blocks[0].inner, "parametrizations")  # what was given stays as it is


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_weights_that_hooks_compute_are_quantized(small_run, name):
    def build():
        make = getattr(torch.nn.utils, name)
        return stack(lambda: make(torch.nn.Linear(64, 128)))()

    model = build()
    model(IDS)  # the hook has computed a weight, which needs a gradient
    artifact = small_run(model, "W8A8", recipe=PLAIN, calibration=list(IDS))
    assert share(artifact) > 0.97
    assert 0 < distance(load(artifact.directory, skeleton=build()), model) < 0.02
    assert hasattr(model.blocks[0].inner, "weight_orig" if name == "spectral_norm" else "weight_g")


def test_a_weight_that_is_computed_may_stay_in_floating_point(small_run):
    model = MODULES["weight_norm"]()
    artifact = small_run(model, "W8A8", recipe={**PLAIN, "ignore": ["head", "blocks.0.inner"]}, calibration=list(IDS))
    assert 0 < distance(load(artifact.directory, skeleton=MODULES["weight_norm"]()), model) < 0.02


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nn.Bilinear", "blocks.0.inner.bilinear.weight and 1 more (`bilinear` reads it, which is no linear)"),
        ("nn.GRU", "blocks.0.inner.gru.weight_hh_l0"),
        ("nn.MultiheadAttention", "blocks.0.inner.attention.in_proj_weight and 3 more (its module computes more than"),
    ],
)
def test_what_is_no_linear_is_named_in_the_last_lines(small_run, name, reason):
    console = Console(file=io.StringIO(), width=1000)
    small_run(MODULES[name](), "W8A8", recipe=PLAIN, calibration=list(IDS), console=console)
    assert f"of the body stays in floating point: {reason}" in console.file.getvalue()


def test_a_model_without_linears_is_told_what_it_has(small_run):
    with pytest.raises(UsageError) as raised:
        small_run(MODULES["1x1 convolutions"](), "W8A8", recipe=PLAIN, calibration=list(IDS))
    assert str(raised.value).startswith(
        "no linear is left to quantize; the largest parameters are blocks.0.down.weight (`conv1d` reads it, which is "
        "no linear), blocks.0.up.weight (`conv1d` reads it"
    )


def test_an_export_of_a_module_says_that_there_is_none(small_run, tmp_path):
    artifact = small_run(MODULES["x @ W"](), "W8A8", recipe=PLAIN, calibration=list(IDS))
    with pytest.raises(
        UsageError, match="is of a module that transformers does not know, for which there is no export"
    ):
        export_artifact(artifact.directory, "onnx", tmp_path / "onnx")


class Drawing(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.drop, self.head = torch.nn.Embedding(64, 16), torch.nn.Dropout(), torch.nn.Linear(16, 64)

    def forward(self, ids):
        x = self.drop(self.embed(ids))
        return self.head(x + torch.rand_like(x))


def test_a_model_that_draws_random_numbers_is_refused(small_run):
    with pytest.raises(
        UsageError, match=r"draws random numbers as it runs \(`rand_like`\), .*; give the part of it that"
    ):
        small_run(Drawing())


class PlainAndTransposed(torch.nn.Module):
    """As in an autoencoder of one weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(64, 128, bias=False), torch.nn.Linear(64, 64)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)) @ self.a.weight)


class Slices(torch.nn.Module):
    """Rows that overlap, and columns, of one weight."""

    def __init__(self):
        super().__init__()
        self.w, self.b = torch.nn.Parameter(torch.randn(128, 64) / 8), torch.nn.Linear(64, 64)

    def forward(self, x):
        left = torch.nn.functional.linear(x, self.w[:64]) + torch.nn.functional.linear(x.tanh(), self.w[32:96])
        return self.b(left + torch.nn.functional.linear(x[..., :32], self.w[64:, :32]))


class Cell(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.GRUCell(64, 64), torch.nn.Linear(64, 64)

    def forward(self, x):
        return self.b(self.a(x.flatten(0, -2)).view_as(x))


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (PlainAndTransposed, "blocks.0.a.weight and 1 more (its module computes more than this product)"),
        (Slices, "blocks.0.w and 1 more (`linear` reads it, in a way that no linear does)"),
        (Cell, "blocks.0.a.weight_hh"),
    ],
)
def test_a_weight_that_is_used_in_more_ways_than_one_is_named(small_run, block, reason):
    """The linear beside it is quantized, and copies of what is loaded compute the same."""

    def build():
        torch.manual_seed(0)
        parts = [torch.nn.Embedding(128, 64), torch.nn.Sequential(block(), block()), torch.nn.Linear(64, 128)]
        model = torch.nn.Sequential(OrderedDict(zip(("embed", "blocks", "head"), parts, strict=True)))
        return model.eval()

    console = Console(file=io.StringIO(), width=1000)
    artifact = small_run(build(), "W8A8", recipe=PLAIN, calibration=list(IDS), console=console)
    assert f"of the body stays in floating point: {reason}" in console.file.getvalue()
    loaded = load(artifact.directory, skeleton=build())
    assert 0 < distance(loaded, build()) < 0.02
    for copied in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert distance(copied, loaded) == 0


class Learned(torch.nn.Module):
    """Queries that are no tokens but a parameter, or a buffer, go straight into a linear."""

    def __init__(self, buffer):
        super().__init__()
        self.table, self.head = torch.nn.Embedding(128, 64), torch.nn.Linear(64, 64)
        self.q, self.k, self.v = (torch.nn.Linear(64, 64) for _ in range(3))
        held = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
        self.held = torch.nn.Buffer(held) if buffer else torch.nn.Parameter(held)

    def forward(self, ids):
        x = self.table(ids)
        return self.head(torch.softmax(self.q(self.held) @ self.k(x).mT, -1) @ self.v(x))


@pytest.mark.parametrize("buffer", [False, True])
def test_linears_of_what_is_no_activation(small_run, buffer):
    torch.manual_seed(0)
    model = Learned(buffer)
    artifact = small_run(model, "W4A8", calibration=IDS, recipe={"ignore": []}, nsamples=4, seqlen=25)
    assert artifact.manifest["body"]["quantized"] == 4 * 64 * 64
    assert 0 < distance(artifact.load(), model) < 0.2


class TwoTypes(torch.nn.Module):
    """A linear in bfloat16 within a model in float32; `fixed` tells how activations are cast."""

    def __init__(self, fixed):
        super().__init__()
        self.table, self.inner = torch.nn.Embedding(64, 64), torch.nn.Linear(64, 64).bfloat16()
        self.head, self.fixed = torch.nn.Linear(64, 64), fixed

    def forward(self, ids):
        x = self.table(ids)
        return self.head(self.inner(x.to(torch.bfloat16 if self.fixed else self.inner.weight.dtype)).float())


@pytest.mark.parametrize("fixed", [False, True])
def test_linears_of_two_types(fixed, tmp_path):
    ids = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(0))
    settings = {"output_dir": tmp_path / "out", "scheme": "W4A16", "group_size": 32, "calibration": ids}
    if not fixed:
        made = quantize_model(TwoTypes(fixed), **settings)
        assert made.manifest["body"]["quantized"] > 0
        return
    with pytest.raises(QuantizeError, match=r"casts activations to a fixed type, and a run computes in float32; let"):
        quantize_model(TwoTypes(fixed), **settings)
