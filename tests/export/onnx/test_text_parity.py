"""An exported language model is compared with the artifact on real text, by what a user can judge."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from helpers.exporting import run_onnx
from rich.console import Console

from quantize import load
from quantize.artifact.writer import PROBE
from quantize.checkpoint.tokenizer import load_tokenize
from quantize.checkpoint.untrusted_files import read_all
from quantize.export.directory import export_artifact
from quantize.export.onnx.export import interface_of
from quantize.export.onnx.onnx_directory import WINDOW, WINDOWS, real_samples
from quantize.export.onnx.parity import onnx_parity

pytestmark = pytest.mark.slow
STEPS = [
    "tracing model.onnx",
    "writing the weights",
    "running in ONNX Runtime",
    "running its operators in torch",
    "running the artifact",
    "running the artifact with float activations",
    "comparing the tokens of real text",
]


@pytest.fixture(scope="module")
def exported(artifact_rtn, tmp_path_factory):
    """The directory of a file, what was measured, and what the console showed."""
    directory, log = tmp_path_factory.mktemp("exported") / "onnx", io.StringIO()
    console = Console(file=log, width=200)
    return directory, export_artifact(artifact_rtn.directory, "onnx", directory, console), log.getvalue()


def test_a_good_file_predicts_what_the_artifact_predicts(exported):
    directory, found, _ = exported
    assert list(found) == ["kl", "top1", "emulation", "reference", "activations"]
    assert abs(found["kl"]) < 1e-6
    assert found["top1"] > 0.99
    assert json.loads((directory / "manifest.json").read_text())["parity"] == found


def test_every_step_is_shown_as_it_begins(exported):
    assert exported[2].splitlines() == [f"exporting {n}/7 {step}" for n, step in enumerate(STEPS, 1)]


def test_a_call_without_a_console_is_silent(artifact_rtn, tmp_path, capfd):
    export_artifact(artifact_rtn.directory, "onnx", tmp_path / "onnx")
    assert capfd.readouterr() == ("", "")


@torch.no_grad()
def test_a_damaged_file_diverges_by_as_much_as_computed_by_hand(exported, artifact_rtn, tmp_path):
    """The norm in front of the scores is another one."""
    shutil.copytree(exported[0], tmp_path / "damaged")
    path, model = tmp_path / "damaged" / "model.onnx", load(artifact_rtn.directory)
    graph = onnx.load(path)
    (gain,) = (x for x in graph.graph.initializer if x.name.endswith("model.norm.weight"))
    values = onnx.numpy_helper.to_array(gain)
    gain.CopyFrom(onnx.numpy_helper.from_array(np.roll(values, 7) * 2, gain.name))
    onnx.save(graph, path)
    interface, samples = interface_of(model), real_samples(artifact_rtn.directory, model)
    feeds = [interface.feed_of(sample) for sample in samples]
    found = onnx_parity(interface, path.parent, real=feeds)
    p = torch.cat([model(**sample).logits[0, :-1] for sample in samples]).double().softmax(-1)
    q = torch.cat([torch.from_numpy(out[0][0, :-1]) for out in run_onnx(path, feeds)]).double().softmax(-1)
    assert found["kl"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    assert found["top1"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert found["kl"] > 0.1
    assert found["top1"] < 0.99


def test_real_text_is_the_bundled_prose_or_a_probe(artifact_rtn, tmp_path):
    model, begin = load(artifact_rtn.directory), load_tokenize(artifact_rtn.directory).leading[0].id
    windows = real_samples(artifact_rtn.directory, model)
    assert [list(window["input_ids"].shape) for window in windows] == [[1, WINDOW]] * WINDOWS
    assert [int(window["input_ids"][0, 0]) for window in windows] == [begin] * WINDOWS
    shutil.copytree(artifact_rtn.directory, tmp_path / "artifact")
    probe = read_all(tmp_path / "artifact" / PROBE)["input_ids"][:1]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "artifact" / name).write_text("{")  # no text can be read
    (found,) = real_samples(tmp_path / "artifact", model)
    assert torch.equal(found["input_ids"], probe)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "artifact" / name).unlink()
    (found,) = real_samples(tmp_path / "artifact", model)
    assert torch.equal(found["input_ids"], probe)


def test_the_command_prints_what_a_user_can_judge(cli, artifact_rtn, tmp_path):
    shown = cli("export", artifact_rtn.directory, "--output-dir", tmp_path / "onnx")
    assert (shown.code, shown.out) == (0, f"{tmp_path / 'onnx'}: kl 0.0000, top1 1.0000\n")
    assert shown.err.startswith("exporting 1/7 tracing model.onnx\n")
