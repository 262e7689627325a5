"""A tensor of the files that transformers splits when it loads it is read part by part."""

from __future__ import annotations

import torch

from benchmarks.families.families import FAMILIES
from quantize.checkpoint.opening import open_checkpoint


def test_queries_keys_and_values_are_split(tmp_path):
    model = FAMILIES["nomic_bert"].build()
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    names = [f"layers.1.self_attn.{kind}_proj.weight" for kind in "qkv"]
    assert {checkpoint.sources[name].names for name in names} == {("encoder.layers.1.attn.Wqkv.weight",)}
    loaded = checkpoint.load()
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    assert not checkpoint.notes
