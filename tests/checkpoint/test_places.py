"""Where a model's files may lie: behind links, in the hub's cache, or as one file beside its config."""

import shutil

import pytest
import torch

from quantize.checkpoint.opening import open_checkpoint
from quantize.errors import UsageError


def test_links_of_a_model_are_followed_and_named_and_an_artifact_holds_files(one_layer, small_run, tmp_path):
    blobs, model = tmp_path / "blobs", tmp_path / "model"
    shutil.copytree(one_layer, blobs)
    model.mkdir()
    for path in blobs.iterdir():
        (model / path.name).symlink_to(f"../blobs/{path.name}")
    found = open_checkpoint(model)
    assert [note for note in found.notes if "files are links and are followed: " in note]
    out = small_run(model, "W8A8", recipe={"passes": [], "quantizer": {"name": "rtn"}}).directory
    assert not [path for path in out.rglob("*") if path.is_symlink()]
    assert (out / "tokenizer.json").read_bytes() == (one_layer / "tokenizer.json").read_bytes()


def test_one_file_beside_its_config_is_the_model(one_layer, tmp_path):
    shutil.copytree(one_layer, tmp_path / "m")
    shutil.copy(one_layer / "model.safetensors", tmp_path / "m" / "other.safetensors")
    found, name = open_checkpoint(tmp_path / "m" / "other.safetensors"), "model.norm.weight"
    assert set(found.files.values()) == {tmp_path / "m" / "other.safetensors"}
    assert torch.equal(found.tensor(name), open_checkpoint(one_layer).tensor(name))
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(UsageError, match=r"is one file of a model, and no config.json lies beside it; put the model's"):
        open_checkpoint(tmp_path / "m" / "other.safetensors")
