"""Artifacts that somebody broke and whose hashes are true: every command ends with a sentence."""

from __future__ import annotations

import functools
import json
import random
import shutil

import pytest
import torch
from helpers.json_files import sign_again
from helpers.mutations import taken
from safetensors.torch import load_file, save_file

from benchmarks.fuzz.mutations import change_one, seal
from quantize.errors import QuantizeError
from quantize.export.directory import export_artifact
from quantize.pipeline.quantize import quantize_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def artifact(books, tmp_path_factory):
    """An artifact for llama.cpp, whose head is a table."""
    output = tmp_path_factory.mktemp("llama.cpp") / "artifact"
    recipe = {"passes": [], "quantizer": {"name": "rtn"}}
    return quantize_model(
        books, output_dir=output, scheme="W8A8", target="llama.cpp", recipe=recipe, nsamples=2, seqlen=16
    ).directory


def without_scale(directory):
    change_tensors(directory, lambda tensors: tensors.pop("lm_head.scale"))


def with_a_flat_scale(directory):
    change_tensors(directory, lambda tensors: tensors.update({"lm_head.scale": tensors["lm_head.scale"].flatten()}))


def with_a_scale_that_is_none(directory):
    change_tensors(directory, lambda tensors: tensors["lm_head.scale"].fill_(torch.nan))


def change_tensors(directory, change):
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        if "lm_head.scale" in tensors:
            change(tensors)
            save_file(tensors, path, {"format": "pt"})


def with_a_token_beyond_the_table(directory):
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 10**6, "content": "<far>"})
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "targets", "words"),
    [
        (without_scale, ["gguf", "safetensors-float", "compressed-tensors"], "lm_head"),
        (with_a_flat_scale, ["gguf", "safetensors-float", "compressed-tensors"], "lm_head"),
        (with_a_scale_that_is_none, ["gguf", "safetensors-float"], "lm_head.scale holds nan"),
        (with_a_token_beyond_the_table, ["gguf"], "the tokenizer in .* cannot be used"),
    ],
)
def test_exports_name_what_is_wrong(damage, targets, words, artifact, tmp_path):
    broken = tmp_path / "artifact"
    shutil.copytree(artifact, broken)
    damage(broken)
    sign_again(broken)
    for target in targets:
        with pytest.raises(QuantizeError, match=words):
            export_artifact(broken, target, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_seeded_changes_of_any_file(artifact, tmp_path):
    counts, files = {True: 0, False: 0}, sorted(path.name for path in artifact.iterdir())
    for seed in range(12):
        rng, broken = random.Random(seed), tmp_path / "artifact"
        shutil.copytree(artifact, broken)
        change_one(broken / rng.choice(files), rng)
        seal(broken, rng)
        target = rng.choice(["gguf", "safetensors-float", "compressed-tensors"])
        export = functools.partial(export_artifact, broken, target, tmp_path / "out")
        counts[taken(export, seconds=20)] += 1
        for path in tmp_path.iterdir():
            assert path.name in ("artifact", "out")
            shutil.rmtree(path)
    assert counts[False] > 2, counts
