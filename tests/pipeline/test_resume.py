"""Runs that are killed at any moment and go on where they were: the same bytes, or a sentence that says why not."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize.calibration.statistics import Absmax, Rows
from quantize.checkpoint.opening import open_checkpoint
from quantize.errors import QuantizeError, UsageError
from quantize.pipeline.resume import journal
from quantize.pipeline.resume.journal import Pace
from quantize.pipeline.resume.work_dir import partial_directory
from quantize.pipeline.sequential import SequentialPipeline
from quantize.pipeline.serialization import contiguous, load_state, save_state
from quantize.recipe.recipe import load_recipe
from quantize.transforms.fold import CentredRotation, Diagonal, Rotation

SETTINGS = {"group_size": 0, "nsamples": 4, "seqlen": 32}
FOLDED = {"passes": list(load_recipe("W4A4", Path("w4a4-folded")).passes)}
RECIPES = {
    "GPTQ": {"scheme": "W4A16", "changes": {"quantizer": {"name": "gptq"}}},
    "learned rotations and GPTAQ": {"scheme": "W4A4", "changes": FOLDED},
    "runtime smooth and tuning": {
        "scheme": "W4A4",
        "changes": {
            "passes": [{"name": n} for n in ("smoothquant", "fold_norms", "rotate", "runtime_smooth")],
            "tune": {"steps": 2},
            "kv_cache": {"num_bits": 4},
            "prefix": {"tokens": [5, 1]},
        },
    },
}


@pytest.fixture
def drive(stories_calibration, tmp_path):
    """Kill and resume runs in processes of their own; a function."""

    def run(model, recipe, kills):
        (tmp_path / "runs").mkdir()
        settings = json.dumps(RECIPES[recipe] | SETTINGS)
        script = Path(__file__).parents[1] / "helpers" / "resuming.py"
        command = [sys.executable, script, model, stories_calibration, tmp_path / "runs", settings, kills]
        done = subprocess.run(map(str, command), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.mark.slow
def test_killed_whenever_something_has_reached_the_disk(drive, one_layer):
    """The first and last moments, every border, and what lies between two files of a border."""
    found = drive(one_layer, "GPTQ", "flushes")
    assert all(kill["killed"] and kill["code"] == 0 and kill["same"] and not kill["left"] for kill in found["kills"])
    places = {place for kill in found["kills"] for place in kill["places"]}
    assert places >= {"identity.json", "border-00001.part", *(f"border-{n:05}" for n in range(1, 4))}
    assert found["flushes"] > 30
    assert len(found["kills"]) >= found["flushes"] / 3


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_killed_at_random_moments(drive, variant, recipe):
    kills = drive(variant("two", num_hidden_layers=2), recipe, "6")["kills"]
    assert len(kills) == 6
    assert sum(kill["killed"] for kill in kills) >= 4
    assert all(kill["same"] for kill in kills)
    assert len({tuple(kill["places"]) for kill in kills}) > 2  # not always in the same place


@pytest.fixture
def fails(monkeypatch):
    """Let runs fail in a block, with an error; None lets them be; a function."""
    process = SequentialPipeline.process

    def at(name, error):
        def failing(self, segment, arriving, file):
            if error is not None and segment.name == name:
                raise error
            return process(self, segment, arriving, file)

        monkeypatch.setattr(SequentialPipeline, "process", failing)

    return at


@pytest.fixture
def attempt(cli, stories_calibration, tmp_path):
    """Quantize with `--resume`; a function."""

    def run(model, *arguments, data=stories_calibration, resume=("--resume",)):
        options = ["--recipe", "w4a4-folded", "--group-size", 0, "--calibration", data, "--nsamples", 2, "--seqlen", 16]
        return cli(model, *options, "--output-dir", tmp_path / "out", *resume, *arguments)

    return run


@pytest.fixture
def partial(tmp_path):
    return tmp_path / ".out.partial"


@pytest.fixture
def broken_off(attempt, fails, variant, partial):
    """A model, and the run of it that broke off in its only layer."""
    model = variant()
    fails("model.layers.0", QuantizeError("it broke"))
    shown = attempt(model)
    assert (shown.code, shown.out) == (1, "")
    kept = f"{partial} keeps what is finished; give the same command again to go on, or remove that directory"
    assert shown.err.splitlines()[-1] == f"error: it broke; {kept}"
    assert sorted(path.name for path in (partial / "journal").iterdir()) == [
        "border-00001", "identity.json", "rotations.safetensors", "survey.safetensors",
    ]  # fmt: skip
    fails("", None)
    return model


def test_a_run_that_failed_goes_on(broken_off, attempt, small_run, tmp_path, tree):
    shown = attempt(broken_off)
    assert shown.code == 0, shown.err
    assert "going on behind block 1 of 3, head" in shown.err
    assert "quantizing 1/2 model.layers.0" in shown.err
    assert "surveying" not in shown.err
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}
    assert tree(tmp_path / "out") == tree(small_run(broken_off, output="at-once", recipe="w4a4-folded"))


def test_an_interrupted_run_leaves_what_it_did_without_being_asked(attempt, fails, one_layer, partial):
    fails("model.layers.0", KeyboardInterrupt())
    shown = attempt(one_layer, resume=())
    kept = f"interrupted; {partial} keeps what is finished; give the same command with --resume to go on, or remove"
    assert shown.code == 1
    assert shown.err.splitlines()[-1] == f"{kept} that directory"
    fails("", None)
    assert "going on behind block 1 of 3" in attempt(one_layer).err


def test_a_run_that_fails_before_its_first_block_leaves_nothing(attempt, one_layer, partial):
    assert attempt(one_layer, "--group-size", 7).code == 2
    assert not partial.exists()


def test_without_resume_a_killed_run_is_not_touched(broken_off, attempt, partial, tree):
    before = tree(partial)
    shown = attempt(broken_off, resume=())
    assert shown.code == 2
    assert f"error: {partial} holds a run that was killed; give --resume to go on with it, or remove" in shown.err
    assert tree(partial) == before


def change_weights(model, **_):
    path = model / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {"model.norm.weight": weights["model.norm.weight"] * 2}, path, {"format": "pt"})


def change_side_file(model, **_):
    (model / "generation_config.json").write_text("{}")


def change_code(monkeypatch, **_):
    monkeypatch.setattr("quantize.pipeline.fingerprint.sources_hash", lambda: "0" * 64)


def change_version(monkeypatch, **_):
    monkeypatch.setattr("quantize.pipeline.fingerprint.version", lambda name: "9" if name == "torch" else version(name))


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        (change_weights, [], "the model (model.safetensors)"),
        (change_side_file, [], "the model (generation_config.json)"),
        (None, ["--seed", 1, "--seqlen", 17], "the recipe (seqlen, seed)"),
        (None, ["--calibration", "other.jsonl"], "the data (calibration)"),
        (None, ["--calibration", "other.jsonl", "--nsamples", 1], "the recipe (nsamples) and the data (calibration)"),
        (change_code, [], "the code (sources)"),
        (change_version, [], "the code (torch)"),
    ],
)
def test_what_has_changed_is_refused_by_name(
    broken_off, attempt, partial, stories_dev, tmp_path, monkeypatch, tree, change, arguments, words
):
    shutil.copy(stories_dev, tmp_path / "other.jsonl")
    monkeypatch.chdir(tmp_path)
    if change:
        change(model=broken_off, monkeypatch=monkeypatch)
    before = tree(partial)
    shown = attempt(broken_off, *arguments)
    assert shown.code == 2
    assert f"error: {words} changed since the run in {partial} was started; go on with what it was" in shown.err
    assert "give the same command again" not in shown.err
    assert tree(partial) == before  # so it can still go on


@pytest.mark.slow
def test_a_module_in_memory_is_known_by_its_weights_and_its_graph(fails, small_run, one_layer):
    model, other = (open_checkpoint(one_layer).load() for _ in range(2))
    fails("model.layers.0", QuantizeError("it broke"))
    with pytest.raises(QuantizeError, match="it broke"):
        small_run(model, resume=True)
    fails("", None)
    with torch.no_grad():
        other.model.norm.weight *= 2
    with pytest.raises(UsageError, match=r"the model \(model\.norm\.weight\) changed"):
        small_run(other, resume=True)
    other.model.norm.weight = model.model.norm.weight
    other.model.layers[0].mlp.act_fn = torch.nn.GELU()
    with pytest.raises(UsageError, match=r"the model \(graph\) changed"):
        small_run(other, resume=True)
    assert small_run(model, resume=True).manifest["parity"]["reloaded"] == 0


@pytest.mark.parametrize("name", ["state.safetensors", "calibration-00000.safetensors", "probes-00001.safetensors"])
@pytest.mark.parametrize("damage", ["shorter", "missing", "another"])
def test_a_damaged_journal_is_refused(broken_off, attempt, partial, name, damage):
    path = partial / "journal" / "border-00001" / name
    if damage == "another":
        shutil.copy(partial / "journal" / "survey.safetensors", path)
    else:
        path.write_bytes(path.read_bytes()[:-9]) if damage == "shorter" else path.unlink()
    shown = attempt(broken_off)
    assert shown.code == 1
    assert f"error: the journal in {partial} is damaged (" in shown.err
    assert "remove that directory to start again" in shown.err


def test_weights_that_changed_since_they_were_written_are_refused(broken_off, attempt, partial):
    path = next((partial / "artifact").glob("model-00001-*"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    shown = attempt(broken_off)
    assert shown.code == 1
    assert f"error: {path} is not as it was written; remove {partial} to start again" in shown.err


def test_two_runs_do_not_work_in_one_place(broken_off, attempt, partial, tree):
    held, before = os.open(partial, os.O_RDONLY), tree(partial)
    fcntl.flock(held, fcntl.LOCK_EX)
    for resume in ((), ("--resume",)):
        shown = attempt(broken_off, resume=resume)
        assert shown.code == 2
        assert f"error: another run works in {partial}; wait for it" in shown.err
    os.close(held)
    assert tree(partial) == before
    assert attempt(broken_off).code == 0


def test_outputs_of_one_name_work_in_different_places(tmp_path):
    (tmp_path / "a").mkdir()
    outputs = [tmp_path / "out", tmp_path / "a" / "out", tmp_path / "b" / "out", tmp_path / "c" / "b" / "out"]
    found = [partial_directory(output).relative_to(tmp_path) for output in outputs]
    assert [str(path) for path in found] == [".out.partial", "a/.out.partial", ".b-out.partial", ".c-b-out.partial"]


def test_values_come_back_with_their_bits_as_they_lie_behind_a_block(tmp_path):
    base = torch.randn(6, 40)
    part = base[2:, 3:30]
    given = {
        "layouts": [part, part.T, torch.randn(1, 5).expand(4, 5), torch.randn(()), torch.empty(0, 3), base[:, ::2]],
        "types": (torch.tensor([True]), torch.tensor([float("nan")]).half(), torch.arange(3), torch.ones(2).bfloat16()),
        "odd": [base.as_strided((1, 4), (9, 1)), base.flatten()[1:], Rows(part.T, Absmax(part[0]))],
        3: [None, True, -1, 1.5e-300, float("inf"), "text", {}],
    }
    save_state(tmp_path / "x.safetensors", given)
    found, before = load_state(tmp_path / "x.safetensors"), contiguous(given)
    assert found[3] == before[3] == given[3]
    assert isinstance(found["types"], tuple)
    for place in ("layouts", "types", "odd"):
        for a, b, c in zip(*(tensors_in(x[place]) for x in (found, before, given)), strict=True):
            assert (a.dtype, a.stride(), a.data_ptr() % 64) == (b.dtype, b.stride(), b.data_ptr() % 64)
            for x in (a, b):
                torch.testing.assert_close(x, c, rtol=0, atol=0, equal_nan=True)
    assert before["types"][2] is given["types"][2]  # nothing is copied in vain


def tensors_in(values):
    return [x for v in values for x in ([v.value, v.absmax.value] if isinstance(v, Rows) else [v])]


class Crossed(torch.nn.Module):
    """Two blocks of which the first hands on a transposed view, so that the next one's sums run over strides."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(96, 96)

        def forward(self, x):
            y = self.linear(x * torch.rsqrt(x.square().mean(-1, keepdim=True)))
            return (x + y).transpose(1, 2).contiguous().transpose(1, 2)

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(512, 96)
        self.layers = torch.nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_value_that_is_not_contiguous_gives_the_same_bytes_with_and_without_resume(fails, small_run, tree, tmp_path):
    torch.manual_seed(0)
    model, settings = Crossed(), {"recipe": {"quantizer": {"name": "gptq"}}, "nsamples": 4, "seqlen": 32}
    at_once = small_run(model, "W4A16", "at-once", **settings)
    fails("layers.1", QuantizeError("it broke"))
    with pytest.raises(QuantizeError, match="it broke"):
        small_run(model, "W4A16", resume=True, **settings)
    (border,) = (tmp_path / ".out.partial/journal").glob("border-*")
    border = load_state(border / "calibration-00000.safetensors")
    assert [x["value"].shape for x in border.values() if isinstance(x.get("value"), torch.Tensor)] == [(3, 32, 96)]
    fails("", None)
    assert tree(small_run(model, "W4A16", resume=True, **settings).directory) == tree(at_once.directory)


def test_only_plain_data_is_stored(tmp_path):
    rows = Rows(torch.ones(2, 3), Absmax(torch.ones(3)))
    transforms = [Diagonal(torch.ones(3)), Rotation(torch.ones(4), 4), CentredRotation(torch.ones(4), 2)]
    save_state(tmp_path / "x.safetensors", {"rows": rows, "transforms": transforms})
    found = load_state(tmp_path / "x.safetensors")
    assert [type(t) for t in found["transforms"]] == [type(t) for t in transforms]
    assert isinstance(found["rows"].absmax, Absmax)
    with pytest.raises(TypeError, match="a Linear cannot be stored"):
        save_state(tmp_path / "y.safetensors", [torch.nn.Linear(2, 2)])


def test_a_large_state_takes_a_tenth_of_the_time(monkeypatch):
    """Storing takes 5 seconds, so the next time is 50 seconds behind its end; what takes 1 is always stored."""
    now = [100.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    pace, told = Pace(), []
    for seconds in (5.0, 1.0):
        assert pace.due()
        with pace.timed():
            now[0] += seconds
        for later in (1.0, 48.0, 2.0):
            now[0] += later
            told.append(pace.due())
    assert told == [False, False, True, True, True, True]


def test_a_run_goes_on_on_another_device_only_by_force(tmp_path):
    kept, here = journal.Journal(tmp_path, tmp_path / "out"), {"code": {"sources": "a"}, "machine": {"device": "cpu"}}
    there, changed = here | {"machine": {"device": "GPU", "driver": "570"}}, here | {"code": {"sources": "b"}}
    kept.begin(here)
    assert kept.begun_on == []
    with pytest.raises(UsageError, match=r"the machine \(device, driver\) changed .* add --force to go on here"):
        kept.begin(there)
    with pytest.raises(UsageError, match=r"the code \(sources\) changed .* started with, or remove"):
        kept.begin(changed, force=True)
    kept.begin(there, force=True)
    assert kept.begun_on == [{"device": "cpu"}]
    kept.begin(there)
