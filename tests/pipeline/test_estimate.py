"""What a dry run foresees, against what then happens."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from torch import nn

from quantize.checkpoint import checkpoint, tensor_files
from quantize.export.targets import exports, formats
from quantize.graph import export as exporter
from quantize.pipeline.estimate import activation_work, duration
from quantize.pipeline.estimate.machine import Machine, measure
from quantize.pipeline.estimate.memory import kronecker_factors
from quantize.pipeline.estimate.report import human, preflight
from quantize.pipeline.estimate.work import Work, passes
from quantize.pipeline.prepare import prepare
from quantize.pipeline.resume.journal import KeptJournal
from quantize.recipe.recipe import load_recipe

SETTINGS = {"group_size": 0, "nsamples": 4, "seqlen": 32}


@pytest.fixture(autouse=True)
def exported_once(program, monkeypatch):
    """All models of one layer have one graph, which is made once: that takes longer than everything else."""
    export = exporter.export_program

    def exported(skeleton):
        config = getattr(skeleton, "config", None)
        return program if getattr(config, "num_hidden_layers", 0) == 1 else export(skeleton)

    monkeypatch.setattr(exporter, "export_program", exported)


@pytest.fixture
def foreseen(stories_calibration):
    """A run that has not begun; a function."""

    def make(model, scheme, changes=None, **settings):
        recipe = load_recipe(scheme, changes, **SETTINGS | settings)
        return preflight(prepare(model, recipe, stories_calibration, read=False))

    return make


@pytest.mark.slow
def test_memory_and_disk_are_within_a_quarter_of_what_then_happens(stories):
    """Of the whole peak, of which most is what the process held before. Time is left to the bench."""
    command = [sys.executable, "-m", "benchmarks.estimate", stories, "W4A4", 8, 128]
    done = subprocess.run(map(str, command), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    before, after = found["foreseen"], found["measured"]
    assert before["disk"] == pytest.approx(after["disk"], rel=0.02)
    assert before["held"] < before["memory"] == pytest.approx(after["memory"], rel=0.25)
    assert before["seconds"] > 0


RECIPES = [
    ("W4A16", {}),
    ("W4A4", {}),
    ("W8A8", {}),
    ("W4A4", {"passes": [{"name": "fold_norms"}, {"name": "rotate"}, {"name": "runtime_smooth"}]}),
    ("MXFP4", {"targets": ["re:.*[qkvo]_proj"]}),
    ("W4A8", {"kv_cache": {"num_bits": 8}, "ignore": ["q_proj"], "quantizer": {"name": "rtn"}}),
]


@pytest.mark.parametrize(("scheme", "changes"), RECIPES)
def test_the_artifact_is_foreseen_to_the_tensor(foreseen, small_run, one_layer, scheme, changes):
    settings = {"group_size": 32} if scheme == "MXFP4" else {}
    found = foreseen(one_layer, scheme, changes, **settings)
    artifact = small_run(one_layer, scheme, recipe=changes, **SETTINGS | settings)
    for tensors, path in zip(filter(None, found.tensors), sorted(artifact.directory.glob("model-*")), strict=True):
        stored = dict(headers(path))
        assert stored == {name: (list(x.shape), x.nbytes) for name, x in tensors.items()}
    assert json.loads(json.dumps(found.settings)) == but_for_clips(artifact.manifest["quantization"])
    disk = sum(path.stat().st_size for path in artifact.directory.iterdir())
    assert found.artifact_bytes() == pytest.approx(disk, rel=0.02)


def but_for_clips(settings):
    """Settings of an artifact without what only data decides: a clip of their own for some linears' inputs."""
    common = settings["scheme"]["activations"] or {}
    for module in settings["modules"].values():
        if "activations" in module and module["activations"] | {"clip_ratio": 0} == common | {"clip_ratio": 0}:
            del module["activations"]
    return settings


def headers(path):
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    for name, entry in header.items():
        if name != "__metadata__":
            yield name, (entry["shape"], entry["data_offsets"][1] - entry["data_offsets"][0])


def test_the_journal_is_foreseen(foreseen, small_run, one_layer, monkeypatch):
    """The largest border, which lies there twice for a moment, without what the probes and the headers take."""
    found, largest = foreseen(one_layer, "W4A16", nsamples=64, seqlen=256), 0
    rename = KeptJournal._rename

    def renamed(self, path):
        nonlocal largest
        rename(self, path)
        largest = max(largest, sum(p.stat().st_size for p in path.glob("[cf]*-*")))

    monkeypatch.setattr("quantize.pipeline.resume.journal.KeptJournal._rename", renamed)
    small_run(one_layer, "W4A16", nsamples=64, seqlen=256)
    assert found.journal_bytes() == pytest.approx(2 * largest, rel=0.1)


def test_a_dry_run_reads_no_weight(foreseen, one_layer, monkeypatch):
    for module in (checkpoint, tensor_files):
        monkeypatch.setattr(module, "read_tensor", lambda *_: pytest.fail("a weight was read"))
    assert foreseen(one_layer, "W4A4").memory_bytes() > 0


@pytest.mark.slow
def test_memory_does_not_grow_with_depth_but_with_data(foreseen, one_layer, stories):
    shallow, deep = (foreseen(model, "W4A16").memory_bytes() for model in (one_layer, stories))
    assert deep == pytest.approx(shallow, rel=0.02)
    assert foreseen(one_layer, "W4A16", nsamples=16).memory_bytes() > 1.3 * shallow
    assert foreseen(one_layer, "W4A16", {"quantizer": {"name": "rtn"}}).memory_bytes() < shallow


@pytest.mark.slow
def test_time_follows_from_counts_and_rates(foreseen, one_layer, stories):
    """By hand: the products of one pass over the calibration data, which ends in front of the last linear rounded."""
    found = foreseen(one_layer, "W4A16", {"quantizer": {"name": "gptq"}})
    tokens, block, down = 4 * 32, 64 * (64 + 32 + 32 + 64) + 3 * 64 * 172, 64 * 172
    attention = 2 * 4 * 8 * 32 * 32 * 8  # q kᵀ and its product with v: rows, heads, tokens, tokens, head_dim
    assert duration.calibration(found).products == tokens * (block - down) + attention
    deep = foreseen(stories, "W4A16", {"quantizer": {"name": "gptq"}})
    assert duration.calibration(deep).products == tokens * (5 * block - down) + 5 * attention
    slow, fast = Machine(*[1e9] * 5, 1e-6, 1e-3), Machine(*[2e9] * 5, 5e-7, 5e-4)
    assert duration.count(found).seconds(slow) == pytest.approx(2 * duration.count(found).seconds(fast))
    more = foreseen(one_layer, "W4A16", nsamples=8)
    assert duration.calibration(more).products == 2 * duration.calibration(found).products
    assert all(0 < value < float("inf") for value in vars(measure()).values())


@pytest.mark.slow
def test_activations_that_find_no_room_take_time(foreseen, stories, monkeypatch):
    """By hand: five stops in each block, at all of which the stream is kept, and at four what a linear takes."""
    found = foreseen(stories, "W4A16", {"quantizer": {"name": "gptq"}})
    assert activation_work.filed(found).elements == 0
    monkeypatch.setattr(activation_work, "IN_MEMORY", 0)
    numbers = 4 * 32 * (64 + 5 * (5 * 64 + 3 * 64 + 172))
    kept = activation_work.filed(found).elements / activation_work.FILED
    assert numbers < kept < 1.1 * numbers  # masks and positions are kept as well


def test_small_tensors_are_not_rated_as_new_memory():
    assert passes(100, 1 << 20).elements == 0 < passes(100, 1 << 20).cached
    assert passes(100, 1 << 24) == Work(elements=100)


def test_hadamard_sizes_are_named(foreseen, one_layer):
    assert list(foreseen(one_layer, "W4A4").hadamards()) == [
        "learned_rotation: 1 bases offline, order 64 = 8 ⊗ 8",
        "learned_rotation: 1 bases offline, order 8 = 2 ⊗ 4",
        "online in front of 1 linears: order 8 = 2 ⊗ 4 across heads of 8",
        "online in front of 1 linears: order 172 = 43 ⊗ 4 (orthogonal, with entries of unequal size: no Hadamard "
        "matrix of this order is known here)",
    ]
    assert kronecker_factors(14336) == "14336 = 112 ⊗ 128"


@pytest.mark.parametrize(
    ("scheme", "changes", "onnx", "compressed"),
    [
        ("W4A16", {}, "", ""),
        ("W8A8", {}, "", ""),
        (
            "W4A8",
            {"passes": [{"name": "fold_norms"}, {"name": "rotate"}]},
            "",
            "no place for a rotation of activations",
        ),
        ("W4A4", {"passes": [{"name": "runtime_smooth", "group_size": 8}]}, "runtime smooth sorts", "runtime smooth"),
        ("NVFP4", {"targets": ["re:.*[qkvo]_proj"]}, "multiply no nvfp4", ""),
        ("W4A8", {"kv_cache": {"num_bits": 4}, "passes": []}, "keys and values", "keys and values"),
        ("W4A16", {"prefix": {"tokens": [1]}}, "", "no place for a prefix"),
    ],
)
def test_formats_are_told_and_why_not(foreseen, one_layer, scheme, changes, onnx, compressed):
    found = formats(foreseen(one_layer, scheme, changes, group_size=16 if scheme == "NVFP4" else 0))
    for name, words in (("onnx", onnx), ("compressed-tensors", compressed)):
        assert words in found[name]
        assert bool(words) == bool(found[name])


def test_a_model_that_is_not_exported_is_foreseen_too(foreseen):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.linear = nn.Embedding(512, 16), nn.Linear(16, 24)

        def forward(self, input_ids):
            x = self.embed(input_ids)
            return self.linear(x) if float(x.sum()) > 1e30 else self.linear(x) + 1

    found = foreseen(Odd(), "W4A16")
    assert found.program.export_error
    assert "no, a module that transformers does not know" in "".join(exports(found))
    assert found.memory_bytes() > 0
    assert duration.count(found).products >= 4 * 32 * 16 * 24


def test_sizes_are_written_for_people():
    assert [human(x) for x in (0, 999, 1234, 2.5e6, 12.345e9, 3e12)] == [
        "0 B",
        "999 B",
        "1.23 kB",
        "2.5 MB",
        "12.3 GB",
        "3 TB",
    ]
