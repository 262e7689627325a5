"""Files that change while they are read: one sentence, no signal, and nothing left."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize.calibration import tensor_samples
from quantize.checkpoint import safetensors_reader
from quantize.checkpoint.checkpoint import Checkpoint
from quantize.checkpoint.opening import open_checkpoint
from quantize.checkpoint.safetensors_reader import read_header, read_rows
from quantize.checkpoint.untrusted_files import read_all
from quantize.errors import ChangedError
from quantize.graph.inputs import Input
from quantize.pipeline import finalize

TENSORS = {
    "a": torch.arange(12.0).view(3, 4), "b": torch.tensor(5, dtype=torch.int8), "c": torch.zeros(0, 3),
    "d": torch.tensor([True, False]), "e": torch.ones(2, 2, dtype=torch.bfloat16),
    "f": torch.ones(3).to(torch.float8_e4m3fn),
}  # fmt: skip
NORM = "model.norm.weight"


def test_tensors_are_read_as_they_were_written(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", {"format": "pt"})
    found = read_all(tmp_path / "x.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        assert (found[name].dtype, found[name].shape) == (expected.dtype, expected.shape)
        assert torch.equal(found[name].float(), expected.float())
    assert torch.equal(read_rows(tmp_path / "x.safetensors", "a", 1, 5), TENSORS["a"][1:])
    assert read_header(tmp_path / "x.safetensors").metadata == {"format": "pt"}


def test_a_file_that_is_cut_while_it_is_read(tmp_path, monkeypatch):
    """The header has been read, and then the file becomes shorter: mapped, this would be a signal."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1 << 16)}, path)
    header = read_header(path)
    os.truncate(path, 1000)
    monkeypatch.setattr(safetensors_reader, "read_header", lambda _: header)
    with pytest.raises(ChangedError, match=r"x.safetensors has become shorter while it was read; start again"):
        read_rows(path, "a")


def shrink(model):
    os.truncate(model / "model.safetensors", (model / "model.safetensors").stat().st_size // 2)


def rewrite(model):
    """Other weights of the same size, in the same place on the disk, and with the same time."""
    path = model / "model.safetensors"
    before, content = path.stat(), load_file(path)
    save_file(content | {NORM: content[NORM] * 1.5}, path.with_suffix(".new"), {"format": "pt"})
    with path.open("r+b") as file:
        file.write(path.with_suffix(".new").read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    path.with_suffix(".new").unlink()


def spoil(model):
    (model / "tokenizer.json").write_text("{}")


def remove(model):
    (model / "tokenizer.json").unlink()


def reconfigure(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))


@pytest.mark.parametrize("change", [shrink, spoil, remove, reconfigure, rewrite])
def test_a_model_that_changes_while_it_is_quantized(change, variant, small_run, tmp_path, monkeypatch):
    """The change comes behind the last block, when a journal has all blocks."""
    model, write = variant(), finalize.write_side_files

    def changed(*arguments):
        change(model)
        write(*arguments)

    monkeypatch.setattr(finalize, "write_side_files", changed)
    with pytest.raises(ChangedError, match=r"has changed since the run began; start again with files that stay"):
        small_run(model, "W8A8", recipe={"quantizer": {"name": "rtn"}})
    shutil.rmtree(model)
    assert not list(tmp_path.iterdir())


def test_weights_that_change_are_noticed_at_the_next_tensor(variant):
    model = variant()
    checkpoint = open_checkpoint(model)
    assert isinstance(checkpoint, Checkpoint)
    shrink(model)
    for read in (checkpoint.tensor, checkpoint.float_tensor):
        with pytest.raises(ChangedError, match=r"model.safetensors has changed since the run began"):
            read(NORM)


def test_calibration_data_that_changes(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(5, 3)}, path)

    def read(path, name):
        found = read_rows(path, name)
        save_file({"x": torch.ones(6, 3)}, path)
        return found

    monkeypatch.setattr(tensor_samples, "read_rows", read)
    with pytest.raises(ChangedError, match=r"x.safetensors has changed while it was read"):
        tensor_samples.read_tensors(path, {"x": Input(torch.zeros(2, 3, device="meta"), (0,))}, 4, None, 512)
