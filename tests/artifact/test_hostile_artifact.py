"""Artifacts that somebody made to break things, their hashes true, and exports that must stay in their directory."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from helpers.mutations import grafted, taken
from safetensors.torch import load_file, save_file

from quantize.artifact.load import load
from quantize.artifact.verify import verify_artifact
from quantize.artifact.writer import sha256
from quantize.errors import QuantizeError, UsageError
from quantize.export.directory import export_artifact


@pytest.fixture
def damaged(artifact_rtn, tmp_path):
    """A copy of an artifact, and a function that changes its manifest and keeps all hashes true."""
    directory = tmp_path / "artifact"
    shutil.copytree(artifact_rtn.directory, directory)

    def change(settings=None):
        manifest = json.loads((artifact_rtn.directory / "manifest.json").read_text())
        manifest["files"] = {name: sha256(directory / name) for name in manifest["files"]}
        (directory / "manifest.json").write_text(
            json.dumps(manifest | ({"quantization": settings} if settings else {}))
        )
        return directory

    return change


def test_artifacts_with_hostile_settings(damaged, artifact_rtn):
    """Paths of modules, columns, online transforms, schemes: `verify` accepts only what runs."""
    rng, sound = random.Random(5), artifact_rtn.manifest["quantization"]
    up = sound["modules"]["model.layers.0.mlp.up_proj"]
    for online in (
        {},
        {"kind": "x"},
        {"kind": "hadamard", "size": 10**9},
        {"kind": "hadamard", "size": 0},
        {"kind": "dual"},
    ):
        with pytest.raises((UsageError, QuantizeError), match="is no transform"):
            load(
                damaged(
                    sound | {"modules": sound["modules"] | {"model.layers.0.mlp.up_proj": up | {"online": [online]}}}
                )
            )
    for path in (
        "",
        "model",
        "model.norm",
        "model.layers.0.mlp",
        "model.layers.7.mlp.up_proj",
        "lm_head",
        "../x",
        "a..b",
    ):
        with pytest.raises(QuantizeError):
            load(damaged(sound | {"modules": sound["modules"] | {path: up}}))
    assert sum(taken(lambda: verify_artifact(damaged(grafted(sound, rng)))) for _ in range(60)) < 30


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("qweight", torch.zeros(0, 32, dtype=torch.uint8)),
        ("qweight", torch.zeros(172, 31, dtype=torch.uint8)),
        ("qweight", torch.zeros(172, 32, dtype=torch.int8)),
        ("qweight", torch.zeros(172, 32, 1, dtype=torch.uint8)),
        ("scale", torch.ones(172, 2)),
        ("scale", torch.zeros(172, 1)),
        ("scale", torch.full((172, 1), float("nan"))),
        ("scale", torch.ones(172, 1, dtype=torch.int32)),
        ("zero_point", torch.zeros(172, 0, dtype=torch.int8)),
        ("zero_point", torch.zeros(172, 1)),
        ("zero_point", None),
        ("global_scale", torch.ones(())),
        ("bias", torch.ones(7)),
    ],
)
def test_an_artifact_with_tensors_of_another_kind(name, tensor, damaged):
    directory, key = damaged(), f"model.layers.0.mlp.up_proj.{name}"
    path = next(path for path in directory.glob("model-*") if "up_proj" in str(load_file(path).keys()))
    kept = {other: found for other, found in load_file(path).items() if other != key}
    save_file(kept | ({} if tensor is None else {key: tensor}), path, {"format": "pt"})
    with pytest.raises(QuantizeError, match=r"of model.layers.0.mlp.up_proj"):
        verify_artifact(damaged())


def test_an_artifact_with_other_tensors_that_do_not_fit(damaged):
    for tensor in (torch.ones(63), torch.ones(0), torch.ones(64, dtype=torch.int8)):
        path = next(path for path in damaged().glob("model-*") if "model.norm.weight" in load_file(path))
        save_file(load_file(path) | {"model.norm.weight": tensor}, path, {"format": "pt"})
        with pytest.raises(QuantizeError, match=r"model.norm.weight"):
            verify_artifact(damaged())


def test_a_manifest_that_lists_files_elsewhere(damaged, tmp_path):
    (tmp_path / "outside").write_text("x")
    manifest = json.loads((damaged() / "manifest.json").read_text())
    manifest["files"]["../outside"] = sha256(tmp_path / "outside")
    (damaged() / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(QuantizeError, match=r"outside is missing"):
        verify_artifact(tmp_path / "artifact")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "compressed-tensors", "safetensors-float"])
def test_an_export_writes_in_its_directory_alone(target, artifact_rtn, tmp_path, tree, monkeypatch):
    """Whatever the name of the output says, and whatever is linked where."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "real")
    name, before = "../link/b c\u00e9/out", tree(tmp_path).keys()
    export_artifact(artifact_rtn.directory, target, Path(name))
    outside = {path for path in tree(tmp_path).keys() - before if not path.startswith("real/b c\u00e9/out")}
    assert outside == {"real/b c\u00e9"}
    (tmp_path / "dangling").symlink_to("/nowhere/at/all")
    with pytest.raises(UsageError, match="dangling exists already"):
        export_artifact(artifact_rtn.directory, target, tmp_path / "dangling")
