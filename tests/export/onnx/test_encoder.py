"""Models without a cache in ONNX Runtime: encoders with segments, images."""

from __future__ import annotations

import onnx
import pytest
import torch
from helpers.exporting import SYMMETRIC_8, nodes, quantized, run_onnx, scheme, shapes, tiny
from transformers import CanineConfig, CanineModel

from quantize.errors import QuantizeError
from quantize.export.onnx.encoder import SinglePassModel
from quantize.export.onnx.export import export_onnx, interface_of
from quantize.export.onnx.interface import random_tokens, vocabulary_of
from quantize.export.onnx.parity import run_torch

TOKENS = ["batch_size", "sequence_length"]
INPUTS = {
    "bert": {"input_ids": TOKENS, "attention_mask": TOKENS, "token_type_ids": TOKENS},
    "vit": {"pixel_values": ["batch_size", 3, 16, 16]},
}
OUTPUTS = {
    "bert": {"last_hidden_state": [*TOKENS, 32]},
    "vit": {"logits": ["batch_size", 5]},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", INPUTS)
def test_a_family_takes_and_gives_what_is_promised(family, tmp_path):
    model = quantized(tiny(family), scheme(8, SYMMETRIC_8))
    differences = export_onnx(model, tmp_path)
    assert differences["reference"] < 1e-5 < differences["activations"]
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert shapes(graph.input) == INPUTS[family]
    assert shapes(graph.output) == OUTPUTS[family]
    assert len(nodes(tmp_path / "model.onnx", "MatMulIntegerToFloat")) == {"bert": 4, "vit": 5}[family]


@pytest.mark.slow
def test_segments_are_told_apart(tmp_path):
    model = quantized(tiny("bert"), scheme(4))
    export_onnx(model, tmp_path)
    first = interface_of(model).feeds(3)["two"]
    second = first | {"token_type_ids": 1 - first["token_type_ids"]}
    (a,), (b,) = run_onnx(tmp_path / "model.onnx", [first, second])
    assert abs(a - b).max() > 1e-3
    assert abs(b - run_torch(interface_of(model), [second])[0][0]).max() < 1e-5


def test_a_model_with_one_segment_takes_none():
    assert list(interface_of(tiny("gpt2").transformer).inputs) == ["input_ids", "attention_mask"]


def test_token_ids_of_a_model_whose_config_names_no_vocabulary():
    """CANINE takes code points, which its tables hold by their hashes; it has 16 kinds of segments."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    model = CanineModel(CanineConfig(**sizes, max_position_embeddings=64, num_hash_buckets=64))
    assert (vocabulary_of(model), random_tokens(model, 4, 64, 0).max()) == (16, 15)


def test_an_input_that_has_no_effect_is_noticed(tmp_path, monkeypatch):
    """An image that the exporter takes for a constant."""
    results = SinglePassModel.results
    constant = torch.ones(2, 3, 16, 16)
    monkeypatch.setattr(SinglePassModel, "results", lambda self, feed: results(self, {"pixel_values": constant}))
    with pytest.raises(QuantizeError, match="same output for different inputs"):
        export_onnx(quantized(tiny("vit"), scheme(4)), tmp_path)
