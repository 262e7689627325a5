"""Targets are known by their folders: the command's choices, options, help and refusals come from the registry."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from helpers.json_files import sign_again

import quantize.export
from quantize.errors import QuantizeError, UsageError
from quantize.export import EXPORTERS, Exporter, Obstacle
from quantize.export.directory import export_artifact

FOLDER = Path(quantize.export.__file__).parent
TOY = "No such tool reads it."


def words(text):
    return " ".join(text.split())


def write_toy(directory, writer, console, *, depth=1, loud=False):
    if console is not None:
        console.print("making a toy")
    manifest = json.loads((directory / "manifest.json").read_text())
    writer.write("toy.json", json.dumps({"scheme": manifest["scheme"], "depth": depth, "loud": loud}))
    return {"parity": {"reference": 0.25, "judge": "not asked"}, "size": depth}


def no_gate_projections(outline):
    if any(path.endswith("gate_proj") for path in outline.settings["modules"]):
        yield Obstacle("toys have no gates", "quantize with --ignore gate_proj")
    if outline.schemes()["model.layers.0.mlp.up_proj"].weights.num_bits == 8:
        yield Obstacle("toys have 4 bits", "quantize with W4A16")


@pytest.fixture
def toy(monkeypatch):
    """A target that is registered for the time of a test."""

    def register(obstacles=lambda outline: ()):
        options = (
            click.Option(["--depth"], type=click.IntRange(1), help="How deep."),
            click.Option(["--loud"], is_flag=True, help="Louder."),
        )
        target = Exporter("toy", TOY, options, obstacles, write_toy)
        monkeypatch.setitem(EXPORTERS, "toy", target)
        return target

    return register


def test_every_folder_is_a_target_and_has_its_tests():
    folders = {path.parent.name for path in FOLDER.glob("*/__init__.py")} - {"model_free"}  # which writes several
    assert {name.replace("_", "-") for name in folders} == EXPORTERS.keys()
    assert {name for name in folders if (Path(__file__).parent / name).is_dir()} == folders


def test_help_lists_every_target_with_its_options(cli, toy):
    toy()
    shown = words(cli("export", "--help").out)
    assert "--format [compressed-tensors|gguf|onnx|safetensors-float|toy]" in shown
    for name, exporter in EXPORTERS.items():
        assert words(f"Format {name}: {exporter.summary}") in shown
    assert words(f"Format toy: {TOY} --depth INTEGER RANGE How deep. [x>=1] --loud Louder.") in shown
    assert words("Format onnx: " + EXPORTERS["onnx"].summary + " --qdq Use standard ONNX operators only") in shown
    assert shown.count("--depth") == shown.count("--qdq") == shown.count("--output-dir") == 1


def test_help_imports_nothing_slow():
    source = (
        "import sys; from click.testing import CliRunner; from quantize.export.command import export\n"
        "assert '--hybrid' in CliRunner().invoke(export, ['--help']).output\n"
        "sys.exit(bool({'torch', 'transformers', 'onnxruntime'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", source], check=False).returncode == 0


@pytest.mark.parametrize("target", sorted(EXPORTERS))
def test_an_artifact_that_lists_what_its_model_lacks(target, artifact_rtn, tmp_path):
    shutil.copytree(artifact_rtn.directory, tmp_path / "artifact")
    manifest = json.loads((tmp_path / "artifact" / "manifest.json").read_text())
    modules = manifest["quantization"]["modules"]
    modules["model.layers.7.no"] = modules["model.layers.0.mlp.up_proj"]
    sign_again(tmp_path / "artifact", quantization=manifest["quantization"])
    with pytest.raises(QuantizeError, match=r"does not fit the model: it lists model\.layers\.7\.no, which the model"):
        export_artifact(tmp_path / "artifact", target, tmp_path / "no")


def test_a_target_runs_with_its_options(cli, toy, artifact_rtn, tmp_path, tree):
    toy()
    shown = cli("export", artifact_rtn.directory, "--format", "toy", "--depth", 3, "--output-dir", tmp_path / "out")
    told = "relative differences from the artifact: outputs 2.5e-01, judge not asked"
    assert (shown.code, shown.out) == (0, f"{tmp_path / 'out'}: {told}\n")
    assert shown.err == "making a toy\n"
    assert json.loads((tmp_path / "out" / "toy.json").read_text()) == {"scheme": "W4A16", "depth": 3, "loud": False}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["format"], manifest["parity"]["reference"], manifest["size"]) == ("toy", 0.25, 3)
    assert {"toy.json", "tokenizer.json", "manifest.json"} <= tree(tmp_path / "out").keys()
    assert export_artifact(artifact_rtn.directory, "toy", tmp_path / "loud", loud=True)["reference"] == 0.25
    assert json.loads((tmp_path / "loud" / "toy.json").read_text())["loud"]
    wrong = cli("export", artifact_rtn.directory, "--format", "toy", "--depth", 0, "--output-dir", tmp_path / "no")
    assert (wrong.code, "0 is not in the range x>=1" in wrong.err) == (2, True)


def test_an_option_of_another_target_is_refused_and_its_target_named(cli, toy, artifact_rtn, tmp_path):
    toy()
    output = ("--output-dir", tmp_path / "no")
    for target, option, owner in [
        ("toy", ["--qdq"], "onnx"),
        ("onnx", ["--depth", 2], "toy"),
        ("onnx", ["--calibration", "x.txt"], "compressed-tensors"),
        ("compressed-tensors", ["--loud"], "toy"),
    ]:
        shown = cli("export", artifact_rtn.directory, "--format", target, *option, *output)
        assert shown.code == 2
        assert shown.err == f"error: {option[0]} belongs to --format {owner}, not to {target}; leave it out\n"
    assert not (tmp_path / "no").exists()
    with pytest.raises(UsageError, match="--colour belongs to no target, not to toy; leave it out"):
        export_artifact(artifact_rtn.directory, "toy", tmp_path / "no", colour="red")
    with pytest.raises(
        UsageError, match="there is no target 'mlx'; known are compressed-tensors, gguf, onnx, safetensors"
    ):
        export_artifact(artifact_rtn.directory, "mlx", tmp_path / "no")


def test_an_option_of_two_targets_goes_to_either(cli, toy, artifact_rtn, tmp_path, monkeypatch):
    first = toy()
    monkeypatch.setitem(EXPORTERS, "twin", Exporter("twin", TOY, first.options[:1], first.obstacles, write_toy))
    for target in ("toy", "twin"):
        shown = cli(
            "export", artifact_rtn.directory, "--format", target, "--depth", 2, "--output-dir", tmp_path / target
        )
        assert shown.code == 0
        assert json.loads((tmp_path / target / "toy.json").read_text())["depth"] == 2
    shown = cli("export", artifact_rtn.directory, "--depth", 2, "--output-dir", tmp_path / "no")
    assert "--depth belongs to --format toy and twin, not to onnx; leave it out" in shown.err


def test_obstacles_are_told_before_a_run_and_before_an_export(
    cli, toy, one_layer, artifact_rtn, stories_calibration, tmp_path
):
    toy(no_gate_projections)
    data = ["--calibration", stories_calibration, "--group-size", 0, "--nsamples", 2, "--seqlen", 16, "--dry-run"]
    both = "toys have no gates; quantize with --ignore gate_proj; toys have 4 bits; quantize with W4A16"
    for arguments, line in [
        (["--scheme", "W8A8"], f"export to toy: no, {both}"),
        (["--scheme", "W4A16", "--ignore", "gate_proj"], "export to toy: yes"),
    ]:
        lines = cli(one_layer, *arguments, *data).out.splitlines()
        assert line in lines
        assert [at.split(":")[0] for at in lines if at.startswith("export to")] == [
            f"export to {name}" for name in sorted(EXPORTERS)
        ]
    shown = cli("export", artifact_rtn.directory, "--format", "toy", "--output-dir", tmp_path / "no")
    assert (shown.code, shown.err) == (2, "error: toys have no gates; quantize with --ignore gate_proj\n")
    assert not (tmp_path / "no").exists()
