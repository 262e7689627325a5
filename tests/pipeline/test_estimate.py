"""What a dry run foresees, against what then happens."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.json_files import bytes_for_programs
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses import FakeTensor

from quantize.checkpoint import checkpoint, tensor_files
from quantize.export.targets import exports, formats
from quantize.graph import interpreter
from quantize.pipeline.estimate import time as estimate_time
from quantize.pipeline.estimate import trial
from quantize.pipeline.estimate.memory import kronecker_factors
from quantize.pipeline.estimate.report import human, preflight
from quantize.pipeline.estimate.time import TimeEstimate, measure_time, rounded
from quantize.pipeline.estimate.trial import Trial, shortened
from quantize.pipeline.prepare import prepare
from quantize.pipeline.resume.journal import Journal
from quantize.recipe.recipe import load_recipe
from quantize.scheme.scheme import Scheme

SETTINGS = {"group_size": 0, "nsamples": 4, "seqlen": 32}


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
    assert before["disk"] == pytest.approx(after["disk"], rel=0.03)  # the manifest of a model as small as this
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
    assert found.artifact_bytes() == pytest.approx(bytes_for_programs(artifact), rel=0.02)


def but_for_clips(settings):
    """Settings of an artifact without what only data decides: a clip of their own for some linears' inputs."""
    common = Scheme(**settings["scheme"])
    for module in settings["modules"].values():
        own = Scheme(**module.get("scheme", settings["scheme"]))
        if own.activations and common.activations:
            clip = {"clip_ratio": common.activations.clip_ratio}
            own = own.model_copy(update={"activations": own.activations.model_copy(update=clip)})
        if own == common:
            module.pop("scheme", None)
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
    rename = Journal._rename

    def renamed(self, path):
        nonlocal largest
        rename(self, path)
        largest = max(largest, sum(p.stat().st_size for p in path.glob("[cfh]*-*")))

    monkeypatch.setattr("quantize.pipeline.resume.journal.Journal._rename", renamed)
    small_run(one_layer, "W4A16", nsamples=64, seqlen=256)
    assert found.journal_bytes() == pytest.approx(2 * largest, rel=0.1)


def test_a_dry_run_reads_no_weight_behind_the_first_block(foreseen, stories, monkeypatch):
    """But for single rows, which tell whether a weight lies on a grid."""
    read, names = tensor_files.read_rows, set()

    def watched(path, name, *part):
        if part[1:] != (1,):
            names.add(name)
        return read(path, name, *part)

    for module in (checkpoint, tensor_files):
        monkeypatch.setattr(module, "read_rows", watched)
    found = foreseen(stories, "W4A4")
    assert found.memory_bytes() > 0
    assert not names
    measure_time(found, 0.0)
    assert names == {"model.embed_tokens.weight"} | {n for n in found.parameters if n.startswith("model.layers.0.")}


@pytest.mark.parametrize("recipe", ["", 'passes = []\nquantizer = { name = "rtn" }\n'], ids=["gptaq", "rtn"])
def test_a_dry_run_names_a_number_that_is_none(cli, variant, recipe, tmp_path, stories_calibration):
    model = variant()
    (tmp_path / "recipe.toml").write_text(recipe)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    options = [
        "--scheme",
        "W4A4",
        "--group-size",
        0,
        "--nsamples",
        2,
        "--seqlen",
        16,
        "--recipe",
        tmp_path / "recipe.toml",
    ]
    shown = cli(model, *options, "--calibration", stories_calibration, "--dry-run")
    assert shown.code == 1
    assert "error: model.layers.0.mlp.up_proj.weight holds nan at [3, 5]; repair the checkpoint" in shown.err


@pytest.mark.slow
def test_memory_does_not_grow_with_depth_but_with_data(foreseen, one_layer, stories):
    shallow, deep = (foreseen(model, "W4A16").memory_bytes() for model in (one_layer, stories))
    assert deep == pytest.approx(shallow, rel=0.02)
    assert foreseen(one_layer, "W4A16", nsamples=16).memory_bytes() > 1.3 * shallow
    assert foreseen(one_layer, "W4A16", {"quantizer": {"name": "rtn"}}).memory_bytes() < shallow


@pytest.mark.parametrize(
    ("scheme", "changes", "rows"),
    [
        ("W4A16", {"quantizer": {"name": "gptq"}}, [8, 16]),
        ("W4A4", {}, [8, 16]),
        ("W4A16", {"quantizer": {"name": "rtn"}}, [0]),
        ("W4A16", {"prefix": {"search": True}}, [1, 2]),
        ("W4A16", {"tune": {"steps": 40}}, [4, 8]),
    ],
)
def test_a_run_takes_what_was_measured_of_its_first_block(
    foreseen, small_run, stories, monkeypatch, scheme, changes, rows
):
    """The clock counts the numbers that nodes compute, so that other work does not matter."""
    now, run_node = [0.0], interpreter.run_node

    def counted(*args):
        value = run_node(*args)
        now[0] += 1 if not isinstance(value, torch.Tensor) else 0 if type(value) is FakeTensor else value.numel()
        return value

    monkeypatch.setattr(interpreter, "run_node", counted)
    monkeypatch.setattr("quantize.pipeline.steps.tune.run_node", counted)
    for module in (estimate_time, trial):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(estimate_time, "BUDGET", 0.0)
    settings = {"nsamples": 32, "seqlen": 256}
    found = measure_time(foreseen(stories, scheme, changes, **settings), 0.0)
    assert found.blocks == 5
    assert [trial.rows for trial in found.trials] == rows
    now[0] = 0.0
    small_run(stories, scheme, recipe=changes, group_size=0, **settings)
    assert found.seconds == pytest.approx(now[0], rel=0.15)


def test_the_line_through_two_parts_is_followed_to_the_whole():
    """By hand: each block 2 s and 1 s a row, twice half a second of surveys a row, 10 s in front of all."""
    parts = tuple(Trial(rows, rows / 2, 10.0, 2.0 + rows) for rows in (1, 4, 8))
    found = TimeEstimate("model.layers.0", 32, 6.0, 7.0, parts)
    assert found.seconds == pytest.approx(7 + 10 + 6 * (2 + 32 * 1.5))
    assert str(found) == "about 5 minutes; ran model.layers.0 on 8 of 32 rows in 10.0 s"
    noisy = TimeEstimate("x", 32, 1.0, 0.0, (Trial(1, 0.0, 0.0, 3.0), Trial(2, 0.0, 0.0, 2.0)))
    assert noisy.seconds == 2.0
    alone = TimeEstimate("x", 0, 3.0, 1.0, (Trial(0, 0.0, 1.0, 2.0),))
    assert str(alone) == "about 8 s; ran x in 2.0 s"


def test_parts_double_until_half_a_minute_is_over(foreseen, one_layer, monkeypatch):
    now = [0.0]

    def run(_found, _segments, rows):
        now[0] += rows
        return Trial(rows, 0.0, 0.0, rows)

    monkeypatch.setattr(estimate_time, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(estimate_time, "run_trial", run)
    found = measure_time(foreseen(one_layer, "W4A16", {"prefix": {"tokens": [1]}}, nsamples=32), 0.0)
    assert [t.rows for t in found.trials] == [1, 2, 4, 8]  # 15 s; 16 more would be 31
    assert (found.rows, found.seconds) == (30, 30)


def test_what_is_learned_in_steps_takes_part_of_them(foreseen, one_layer):
    changes = {"tune": {"steps": 100}, "passes": [{"name": "learned_rotation"}]}
    plan = shortened(foreseen(one_layer, "W4A4", changes).plan, 1 / 16)
    steps = {step.handler.name: step.handler.steps for step in plan.steps if "steps" in step.handler.model_dump()}
    assert steps == {"learned_rotation": 12}
    assert plan.recipe.tune.steps == 6


def test_times_are_told_as_people_tell_them():
    assert [rounded(x) for x in (0.4, 8.3, 12, 98, 101, 400, 9000)] == [
        "0 s",
        "8 s",
        "10 s",
        "100 s",
        "2 minutes",
        "7 minutes",
        "2.5 hours",
    ]


def test_hadamard_sizes_are_named(foreseen, one_layer):
    passes = [{"name": "fold_norms"}, {"name": "learned_rotation"}]
    assert list(foreseen(one_layer, "W4A4", {"passes": passes}).hadamards()) == [
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
        ("W4A16", {"weights": {"format": "nf4"}}, "multiply no nf4", "no place for nf4 weights"),
        ("W4A8", {"kv_cache": {"num_bits": 4}, "passes": []}, "keys and values", ""),
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
    assert 0 < measure_time(found, 0.0).seconds < 100


def test_sizes_are_written_for_people():
    assert [human(x) for x in (0, 999, 1234, 2.5e6, 12.345e9, 3e12)] == [
        "0 B",
        "999 B",
        "1.23 kB",
        "2.5 MB",
        "12.3 GB",
        "3 TB",
    ]
