"""Models that cannot be exported: every linear is quantized, with online transforms only, and it is said why."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional
from transformers import LongformerConfig, LongformerForMaskedLM

from quantize import load
from quantize.artifact.verify import verify_artifact
from quantize.calibration.runner import SequentialRunner
from quantize.checkpoint.opening import open_checkpoint
from quantize.errors import QuantizeError
from quantize.graph.allowed_transforms import AllowedTransforms
from quantize.graph.analysis import find_bases
from quantize.graph.fallback.program import KEPT_ROWS, LinearsOnlyProgram, make_program
from quantize.graph.interpreter import Overrides
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.transforms.online import Hadamard

TOKENS = torch.arange(3, 43).reshape(2, 20)
LINEARS = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head"]
RTN = {"passes": [], "quantizer": {"name": "rtn"}}
WHY = "it decides by the values of tensors, "


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(dim, 3 * dim), nn.Linear(3 * dim, dim), nn.LayerNorm(dim)
        with torch.no_grad():
            self.norm.weight[::7] *= 20  # outliers

    def forward(self, x):
        y = self.down(functional.gelu(self.up(x)))
        x += y  # in place: what `up` has read is another thing afterwards
        return self.norm(x)


class Chooses(nn.Module):
    """Asks what the ids are before it decides what to compute, so no graph shows it all."""

    def __init__(self, rounds=1, seldom=False, tied=False):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(512, 16), nn.ModuleList([Block(16), Block(16)])
        self.places, self.rounds = nn.Embedding(64, 16), rounds
        self.head = nn.Linear(16, 512, bias=False)
        if seldom:
            self.seldom = nn.Linear(16, 16)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.rounds * list(self.blocks):
            x = block(x)
        if int(ids.sum()) < 3 and hasattr(self, "seldom"):
            x = self.seldom(x)
        return self.head(x)


@pytest.fixture
def module():
    """Build such a module from a seed; a function."""

    def build(seed=0, **arguments):
        torch.manual_seed(seed)
        return Chooses(**arguments)

    return build


@pytest.fixture
def longformer(tmp_path):
    """A directory with a model of transformers that asks its mask whether to attend globally."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LongformerConfig(vocab_size=512, max_position_embeddings=80, attention_window=[8, 8], **sizes)
    LongformerForMaskedLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def program_of(model):
    checkpoint = open_checkpoint(model)
    return make_program(checkpoint, checkpoint.skeleton())


@torch.no_grad()
def distance(a, b):
    return float((a(TOKENS) - b(TOKENS)).abs().max() / b(TOKENS).abs().max())


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("rounds", [1, 2])
def test_each_linear_is_given_what_reaches_it_in_the_float_model(module, rounds):
    model, seen = module(rounds=rounds).eval(), {path: [] for path in LINEARS}
    for path in LINEARS:
        model.get_submodule(path).register_forward_pre_hook(lambda _, x, path=path: seen[path].append(x[0].clone()))
    with torch.no_grad():
        model(TOKENS)
    program = program_of(module(rounds=rounds))
    assert [segment.name for segment in program.segments] == ["blocks.0", "blocks.1", "tail"]
    runner = SequentialRunner(program, [TOKENS])
    for segment in program.segments:
        for (linear,) in runner.advance_to_linears(
            segment, Overrides(dict(model.named_parameters())), program.linears(segment)
        ):
            expected = torch.cat(seen.pop(linear.path)).flatten(0, 1)
            torch.testing.assert_close(runner.values[0][linear.source], expected, rtol=0, atol=0)
            assert len(expected) == TOKENS.numel() * (1 if linear.path == "head" else rounds)
    assert not seen
    assert [output.shape for output in runner.outputs()] == [(KEPT_ROWS, n) for n in (48, 16, 48, 16, 512)]


def test_the_graph_admits_no_transform_and_says_why(module):
    program = program_of(module())
    assert isinstance(program, LinearsOnlyProgram)
    assert program.vocabulary == 512
    bases = find_bases(program).all
    assert {basis.allowed for basis in bases} == {AllowedTransforms.NONE}
    assert {edge.parameter for b in bases for edge in b.readers} == {f"{path}.weight" for path in LINEARS}
    assert all(basis.pins for basis in bases)


def test_it_is_quantized_and_close_the_closer_the_more_bits(small_run, module):
    model, distances = module(), []
    before = state(model)
    for scheme, bound in (("W8A8", 0.03), ("W4A4", 0.4)):
        artifact = small_run(model, scheme, output=scheme, recipe={"ignore": []})
        loaded = load(artifact.directory, skeleton=module(seed=1))
        assert all(isinstance(loaded.get_submodule(path), QuantizedLinear) for path in LINEARS)
        distances.append(distance(loaded, model))
        assert 0 < distances[-1] < bound
    assert distances[0] < distances[1] / 4
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.training


def test_every_linear_is_rotated_online_and_only_that(small_run, module):
    passes = [{"name": "rescale"}, {"name": "rotate", "residual": False}, {"name": "activation_clip"}]
    artifact = small_run(module(), recipe={"ignore": ["blocks.1.up"], "passes": passes})
    modules = artifact.manifest["quantization"]["modules"]
    sizes = {"blocks.0.up": 16, "blocks.0.down": 48, "blocks.1.down": 48, "head": 16}
    assert {path: entry["online"] for path, entry in modules.items()} == {
        path: [Hadamard(size).settings()] for path, size in sizes.items()
    }
    assert artifact.manifest["coverage"]["blocks.1.up.weight"] == "ignored by 'blocks.1.up'"
    assert artifact.manifest["coverage"].keys() == dict(module().named_parameters()).keys()
    (passed,) = artifact.manifest["gate"]["passes"].items()
    assert passed[0] == "rotate"
    assert passed[1].keys() == {"blocks.0", "blocks.1", "tail"}
    assert all(0 < difference < 1e-5 for difference in passed[1].values())


def test_the_manifest_and_the_summary_say_why(small_run, module, artifact_rtn):
    artifact = small_run(module(), "W8A8")
    export = artifact.manifest["export"]
    assert not export["exported"]
    assert WHY in export["reason"]
    assert "\n" not in export["reason"]
    assert export["not_compared"] == []
    assert "cannot be exported" in artifact.summary()
    assert artifact_rtn.manifest["export"] == {"exported": True, "reason": "", "not_compared": []}
    assert "export" not in artifact_rtn.summary()


def test_only_verbose_shows_the_words_of_the_exporter(small_run, module, capsys):
    said = []
    for number, verbose in enumerate((False, True)):
        console = Console(file=io.StringIO())
        small_run(module(), "W8A8", f"out{number}", recipe=RTN, console=console, verbose=verbose)
        said.append(capsys.readouterr().err)
    assert ["data-dependent" in each for each in said] == [False, True]


def test_only_verbose_shows_the_words_of_an_operator(small_run, capsys):
    for verbose in (False, True):
        with pytest.raises(QuantizeError, match="--verbose shows the whole error"):
            small_run(TakesOne(), console=Console(file=io.StringIO()), verbose=verbose)
        assert ("IndexError: list index out of range" in capsys.readouterr().err) is verbose


def test_a_linear_that_never_runs_is_left_out_or_rounded_without_data(small_run, module):
    model = module(seldom=True)
    plain = small_run(model)
    assert plain.manifest["rounded_without_data"] == ["seldom"]
    assert plain.manifest["coverage"]["seldom.weight"] == "quantized"
    assert "no calibration row reached seldom, so plain rounding was all" in plain.warning
    left_out = small_run(model, output="left_out", ignore=["seldom"])
    assert left_out.manifest["coverage"]["seldom.weight"] == "ignored by 'seldom'"
    assert "rounded_without_data" not in left_out.manifest
    rounded = small_run(model, "W8A8", output="rounded", recipe={**RTN, "passes": [{"name": "rotate"}]})
    assert rounded.manifest["coverage"]["seldom.weight"] == "quantized"
    assert rounded.manifest["export"]["not_compared"] == ["seldom"]
    loaded, zeros = load(rounded.directory, skeleton=module(seldom=True, seed=1)), torch.zeros(1, 5, dtype=torch.long)
    with torch.no_grad():  # there it runs
        assert float((loaded(zeros) - model(zeros)).abs().max() / model(zeros).abs().max()) < 0.05


def test_tied_weights_stay_tied_if_no_linear_of_them_is_quantized(small_run, module):
    model = module(tied=True)
    artifact = small_run(model, "W8A8")
    index = json.loads((artifact.directory / "model.safetensors.index.json").read_text())["weight_map"]
    assert len({"embed.weight", "head.weight"} & index.keys()) == 1
    loaded = load(artifact.directory, skeleton=module(seed=1, tied=True))
    assert loaded.head.weight is loaded.embed.weight
    assert distance(loaded, model) < 0.03
    assert not artifact.manifest["untied"]
    assert small_run(model, "W8A8", output="both", recipe={"ignore": []}).manifest["untied"]


def test_the_same_input_gives_the_same_bytes(small_run, module, tree):
    first, second = (small_run(module(), output=name) for name in ("first", "second"))
    assert tree(first.directory) == tree(second.directory)


def test_an_interruption_inside_the_model_leaves_nothing(small_run, module, tmp_path, monkeypatch):
    runs = []

    def interrupted(self, ids):
        runs.append(ids)
        if len(runs) == 6:
            raise KeyboardInterrupt
        return forward(self, ids)

    forward = Chooses.forward
    monkeypatch.setattr(Chooses, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small_run(module())
    assert len(runs) == 6
    assert {path.name for path in tmp_path.iterdir()} <= {".out.partial"}  # what was finished


class WithoutLinears(Chooses):
    """There is nothing to quantize in it."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(), nn.LayerNorm(16)


class TakesOne(Chooses):
    """Refuses more than one row."""

    def forward(self, ids):
        return super().forward(ids) if len(ids) == 1 else [][0]


class CountsItself(nn.Embedding):
    """A table of positions that is given token ids, or their shape, and looks up neither."""

    def forward(self, ids):
        return super().forward(torch.arange((ids if isinstance(ids, torch.Size) else ids.shape)[-1]))


class CountsPlaces(Chooses):
    """Looks up positions in a table that is smaller than the one of words."""

    def __init__(self, sizes):
        super().__init__()
        self.places, self.sizes = CountsItself(64, 16), sizes

    def forward(self, ids):
        x = self.embed(ids) + self.places(ids.shape if self.sizes else ids)
        return self.head(self.blocks[1](self.blocks[0](x))) if int(ids.sum()) else x


@pytest.mark.parametrize("sizes", [False, True])
def test_token_ids_lie_below_the_tables_that_are_looked_up_by_them(small_run, sizes):
    program = program_of(CountsPlaces(sizes))
    assert (program.vocabulary, program.bounds) == (512, {"ids": 512})
    assert small_run(CountsPlaces(sizes), "W8A8", recipe=RTN).manifest["body"]["quantized"] == 4 * 48 * 16


class ReadsTheWeight(Chooses):
    """Its head is more than a linear, for all ids or for some."""

    def __init__(self, always=False):
        super().__init__()
        self.always = always

    def forward(self, ids):
        reads = self.always or int(ids.sum()) > 3
        return super().forward(ids) + (self.head.weight.mean() if reads else 0)


def test_a_linear_whose_weight_the_model_reads_itself_is_left_alone(small_run):
    torch.manual_seed(0)
    model = ReadsTheWeight(always=True)
    artifact = small_run(model, "W8A8")
    assert artifact.manifest["coverage"]["head.weight"] == "the model reads it itself, not through its module"
    assert artifact.manifest["quantization"]["modules"].keys() == set(LINEARS) - {"head"}
    assert 0 < distance(load(artifact.directory, skeleton=ReadsTheWeight(always=True)), model) < 0.03


class Asks(Chooses):
    """Asks weights for their dtype and shape, one in a way that no answer can be given to that is no tensor."""

    def __init__(self, slices=False):
        super().__init__()
        self.slices = slices

    def forward(self, ids):
        dtype = self.head.weight.dtype
        read = self.blocks[0].up.weight[:1].mean() if self.slices else self.blocks[0].up.weight.shape[0]
        return super().forward(ids).to(dtype) + read


@pytest.mark.parametrize(("slices", "left"), [(False, set()), (True, {"head", "blocks.0.up"})])
def test_a_weight_that_is_asked_for_its_dtype_alone_is_quantized(small_run, slices, left):
    artifact = small_run(Asks(slices), "W8A8", recipe=RTN | {"ignore": []})
    assert artifact.manifest["quantization"]["modules"].keys() == set(LINEARS) - left
    assert load(artifact.directory, skeleton=Asks(slices))(TOKENS).isfinite().all()


def test_tables_of_words_are_outside_of_the_body(small_run, module):
    manifest = small_run(module(), "W8A8", recipe=RTN).manifest
    body = manifest["body"]
    assert manifest["coverage"]["places.weight"] == "a table of rows that are looked up"
    words = 2 * 512 * 16  # the table and the linear that scores the vocabulary
    assert body["parameters"] == sum(p.numel() for p in module().parameters()) - words
    assert body["quantized"] == 4 * 48 * 16


class ChangesItself(Chooses):
    """Holds its weights in bounds as it runs."""

    def forward(self, ids):
        self.blocks[0].up.bias.clamp_(-0.1, 0.1)
        return super().forward(ids)


def test_a_model_that_changes_its_own_weights_keeps_them(small_run):
    model = ChangesItself()
    before = state(model)
    small_run(model, "W8A8")
    assert float(before["blocks.0.up.bias"].abs().max()) > 0.2
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (WithoutLinears, r"^the model cannot be exported as a graph: .+"),
        (
            TakesOne,
            r"^the model does not run on inputs of shape \[2, 8\], test_unexported.py line \d+: .+; if ids is not "
            r"token ids, give calibration data with a tensor ids, and --verbose shows",
        ),
        (ReadsTheWeight, r"^the quantized model does not run, test_unexported.py line \d+; leave out with --ignore"),
    ],
)
def test_what_stays_impossible_is_one_sentence(small_run, tmp_path, kind, sentence):
    with pytest.raises(QuantizeError, match=sentence) as raised:
        small_run(kind(), recipe={"ignore": []})
    assert "\n" not in str(raised.value)
    assert {path.name for path in tmp_path.iterdir()} <= {".out.partial"}  # what was finished


@pytest.mark.slow
def test_a_directory_through_the_command(cli, longformer, stories_calibration, tmp_path):
    options = ["--scheme", "W4A4", "--group-size", 0, "--nsamples", 2, "--seqlen", 16, "--ignore", "re:.*_global"]
    options += ["--calibration", stories_calibration]
    planned = cli(longformer, *options, "--dry-run")
    assert planned.code == 0
    assert "pass rotate: 0 bases offline, 13 linears online" in planned.out.splitlines()
    line = next(line for line in planned.out.splitlines() if line.startswith("the model cannot be exported ("))
    assert WHY in line
    assert line.endswith("): only online transforms are used")
    shown = cli(longformer, *options, "--output-dir", tmp_path / "out")
    assert shown.code == 0, shown.err
    assert shown.err.splitlines()[0] == line  # and not half a graph, which the exporter prints where it fails
    assert "cannot be exported" in shown.out
    verified = cli("verify", tmp_path / "out")
    assert verified.code == 0, verified.err
    assert verify_artifact(tmp_path / "out")["difference"] < 1e-6
    for_onnx = cli("export", tmp_path / "out", "--output-dir", tmp_path / "onnx")
    assert for_onnx.code == 1
    assert for_onnx.err.splitlines()[-1].startswith(
        "error: the model cannot be traced for ONNX, as it decides by the values of"
    )
    assert all(line.startswith("exporting ") for line in for_onnx.err.splitlines()[:-1])
    assert not (tmp_path / "onnx").exists()


@pytest.mark.slow
def test_inspect_shows_the_reason(cli, longformer):
    found = json.loads(cli("inspect", longformer, "--json").out)
    assert not found["export"]["exported"]
    assert WHY in found["export"]["reason"]
    assert {basis["allowed"] for basis in found["bases"]} == {"none"}
    shown = cli("inspect", longformer)
    assert shown.code == 0
    assert found["export"]["reason"] in shown.out
