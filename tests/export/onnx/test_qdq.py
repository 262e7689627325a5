"""Portable files: standard operators only, which ONNX Runtime fuses again, at the precision that was meant."""

from __future__ import annotations

import json

import onnx
import onnxruntime
import pytest
from helpers.exporting import ASYMMETRIC_4, SYMMETRIC_8, nodes, quantized, run_onnx, scheme, tiny

from quantize.export.onnx.export import QDQ_ACCURACY, export_onnx, interface_of
from quantize.export.onnx.parity import relative_output_error, run_torch


def as_run(path, tmp_path, entries):
    """What ONNX Runtime makes of a file: the kinds of its nodes."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]


@pytest.mark.slow
@pytest.mark.parametrize(("activations", "level"), [(None, "0"), (SYMMETRIC_8, "4")], ids=["W4A16", "W4A8"])
def test_four_bit_weights_are_fused_again(activations, level, tmp_path):
    """OPT has biases, and a linear on [tokens, channels] with Relu behind it."""
    model = quantized(tiny("opt"), scheme(4, activations, group_size=16, symmetric=False))
    differences = export_onnx(model, tmp_path, qdq=True)
    assert differences["emulation"] < 1e-4
    path, entries = tmp_path / "model.onnx", json.loads((tmp_path / "ort_config.json").read_text())
    assert {entry.domain for entry in onnx.load(path).opset_import} == {""}
    assert len(nodes(path, "DequantizeLinear")) == 6
    entries = entries["session_config_entries"]
    assert entries[QDQ_ACCURACY] == level
    kinds = as_run(path, tmp_path, entries)
    assert kinds.count("MatMulNBits") == 6
    assert "DequantizeLinear" not in kinds


@pytest.mark.slow
def test_without_the_option_activations_would_be_rounded(tmp_path):
    model = quantized(tiny("llama"), scheme(4, group_size=16))
    export_onnx(model, tmp_path, qdq=True)
    interface = interface_of(model)
    feeds = [interface.feeds(1)["prefill"]]
    expected = run_torch(interface, feeds)
    assert relative_output_error(run_onnx(tmp_path / "model.onnx", feeds, {QDQ_ACCURACY: "0"}), expected) < 1e-5
    assert relative_output_error(run_onnx(tmp_path / "model.onnx", feeds, {}), expected) > 1e-4


@pytest.mark.slow
def test_integers_are_standard_operators_too(tmp_path):
    model = quantized(tiny("vit"), scheme(4, ASYMMETRIC_4, symmetric=False))
    assert export_onnx(model, tmp_path, qdq=True)["reference"] < 1e-4
    assert len(nodes(tmp_path / "model.onnx", "MatMulInteger")) == 7
    assert {entry.domain for entry in onnx.load(tmp_path / "model.onnx").opset_import} == {""}
    config = json.loads((tmp_path / "ort_config.json").read_text())
    assert config["precisions"] == {"8-bit weights, 8-bit activations by token, 32-bit sums": 7}
    assert QDQ_ACCURACY not in config["session_config_entries"]
