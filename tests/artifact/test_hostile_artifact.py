"""Artifacts that somebody made to break things, their hashes true, and exports that must stay in their directory."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from helpers.json_files import sign_again
from helpers.mutations import grafted, taken
from safetensors.torch import load_file, save_file

from quantize.artifact.load import load
from quantize.artifact.manifest import digest_of
from quantize.artifact.verify import verify_artifact
from quantize.artifact.writer import PROBE
from quantize.checkpoint.files_seen import sha256
from quantize.errors import QuantizeError, UsageError
from quantize.export.directory import export_artifact


@pytest.fixture
def damaged(artifact_rtn, tmp_path):
    """A copy of an artifact, and a function that changes its manifest and keeps all hashes true."""
    directory = tmp_path / "artifact"
    shutil.copytree(artifact_rtn.directory, directory)

    def change(settings=None):
        shutil.copy(artifact_rtn.directory / "manifest.json", directory)
        sign_again(directory, **({"quantization": settings} if settings else {}))
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
        ("scale", torch.full((172, 1), float("inf"))),
        ("bias", torch.full((172,), float("inf"))),
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
    with pytest.raises(QuantizeError, match=r"(of|safetensors:) model.layers.0.mlp.up_proj"):
        verify_artifact(damaged())


def test_an_artifact_with_other_tensors_that_do_not_fit(damaged):
    wrong = torch.ones(64).index_fill_(0, torch.tensor(3), float("nan"))
    for tensor in (torch.ones(63), torch.ones(0), torch.ones(64, dtype=torch.int8), wrong):
        path = next(path for path in damaged().glob("model-*") if "model.norm.weight" in load_file(path))
        save_file(load_file(path) | {"model.norm.weight": tensor}, path, {"format": "pt"})
        with pytest.raises(QuantizeError, match=r"model.norm.weight"):
            verify_artifact(damaged())


def test_a_manifest_that_lists_files_elsewhere(damaged, tmp_path):
    (tmp_path / "outside").write_text("x")
    manifest = json.loads((damaged() / "manifest.json").read_text())
    sign_again(tmp_path / "artifact", files=manifest["files"] | {"../outside": sha256(tmp_path / "outside")})
    with pytest.raises(QuantizeError, match=r"outside is missing"):
        verify_artifact(tmp_path / "artifact")


@pytest.mark.parametrize(
    ("probe", "words"),
    [
        ({}, "holds no output to compare with"),
        ({"output": torch.ones(2, 512)}, "holds nothing as inputs"),
        ({"input_ids": torch.tensor(3), "output": torch.ones(2, 512)}, r"holds input_ids \[\] as inputs; each has a"),
        (
            {"input_ids": torch.ones(0, 4, dtype=torch.int64), "output": torch.ones(2, 512)},
            r"input_ids \[0, 4\] as inputs",
        ),
        (
            {"input_ids": torch.ones(2, 4, dtype=torch.int64), "a": torch.ones(3), "output": torch.ones(2, 512)},
            "a first",
        ),
        (
            {"input_ids": torch.ones(2, 4, dtype=torch.int64), "output": torch.ones(2, 5)},
            r"output \[2, 5\] of torch.float32",
        ),
        (
            {"input_ids": torch.ones(2, 4, dtype=torch.int64), "output": torch.ones(2, 512, dtype=torch.uint8)},
            "uint8, where",
        ),
        ({"input_ids": torch.ones(2, 4), "output": torch.ones(2, 512)}, "the quantized model does not run"),
        ({"input_ids": torch.full((2, 4), 10**6), "output": torch.ones(2, 512)}, "the quantized model does not run"),
    ],
)
def test_probes_of_another_kind(probe, words, damaged):
    save_file(probe, damaged() / PROBE)
    with pytest.raises(QuantizeError, match=words):
        verify_artifact(damaged())


@pytest.mark.parametrize(
    "changes",
    [
        lambda manifest: manifest["quantization"]["modules"]["model.layers.0.mlp.up_proj"].update(columns="64"),
        lambda manifest: manifest["quantization"]["modules"]["model.layers.0.mlp.up_proj"].update(columns=True),
        lambda manifest: manifest["quantization"]["scheme"]["weights"].update(num_bits="4"),
        lambda manifest: manifest["quantization"]["scheme"]["weights"].update(symmetric=1),
        lambda manifest: manifest["quantization"].update(prefix=[1.0]),
        lambda manifest: manifest["quantization"].update(tables="model.embed_tokens"),
        lambda manifest: manifest.update(files={"config.json": 5}),
        lambda manifest: manifest.update(coverage=[]),
        lambda manifest: manifest.update(gate={"passes": {"rotate": 3}}),
        lambda manifest: manifest.update(parity={"reloaded": []}),
        lambda manifest: manifest.update(versions=None),
        lambda manifest: manifest.update(calibration={"rows": -1, "tokens": 1, "sha256": "a"}),
        lambda manifest: manifest.update(digest=None),
    ],
)
def test_a_field_of_another_type(changes, damaged):
    manifest = json.loads((damaged() / "manifest.json").read_text())
    changes(manifest)
    for use in (verify_artifact, load):
        with pytest.raises(UsageError, match=r"manifest\.json: "):
            use(manifest_directory(damaged, manifest))


def manifest_directory(damaged, manifest):
    """The artifact with this manifest, whose hashes are true."""
    directory = damaged()
    (directory / "manifest.json").write_text(
        json.dumps(manifest | {"digest": digest_of(manifest)} if manifest["digest"] else manifest)
    )
    return directory


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
