"""Language models with both lowerings in one file: which one runs, what it computes, what is kept once."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from helpers.exporting import ASYMMETRIC_8, SYMMETRIC_8, attributes, nodes, quantized, run_onnx, scheme, tiny
from onnx import helper

from quantize.errors import UsageError
from quantize.export.comparison import copy_with_replaced_linears
from quantize.export.onnx import kv_cache_buffers
from quantize.export.onnx.export import export_onnx, interface_of
from quantize.export.onnx.hybrid_linear import MANY, by_channel
from quantize.export.onnx.lowering import lower
from quantize.export.onnx.parity import relative_output_error, run_torch
from quantize.export.onnx.rewrites.in_place import keep_in_place
from quantize.export.onnx.runtime.decoder_session import OnnxDecoder
from quantize.nn.quantized_linear import QuantizedLinear

pytestmark = pytest.mark.slow

BLOCKS = "4-bit weights, 8-bit activations in blocks of"
INTEGERS = "8-bit weights, 8-bit activations by token, 32-bit sums"


@pytest.fixture(scope="module")
def model():
    return quantized(tiny("llama", layers=2), scheme(4, SYMMETRIC_8))


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("hybrid")
    return path, export_onnx(model, path, hybrid=True, large=0)


def test_prompts_are_exact_and_single_tokens_in_blocks(model, exported):
    """With one scale a channel, 8-bit products are the quantized model; 4-bit ones round activations in blocks."""
    path, differences = exported
    assert differences["emulation"] < 1e-5 < 1e-4 < differences["reference"]
    interface = interface_of(model)
    for samples, tokens, exact in [(1, MANY, 1), (4, 4, 1), (2, 2, 1), (1, MANY - 1, 0), (5, 1, 0), (1, 1, 0)]:
        feed = interface.feed(samples, tokens, 3, seed=4)
        found = relative_output_error(run_onnx(path / "model.onnx", [feed]), run_torch(interface, [feed]))
        assert (found < 1e-5) == bool(exact), (samples, tokens, found)


def test_what_runs_is_said_and_what_is_alike_is_kept_once(exported):
    path, _ = exported
    config = json.loads((path / "ort_config.json").read_text())
    assert sum(count for name, count in config["precisions"].items() if name.startswith(BLOCKS)) == 14
    assert config["precisions_prompts"] == {INTEGERS: 14, "float32": 1}
    (choice,) = nodes(path / "model.onnx", "If")
    file = onnx.load(path / "model.onnx").graph
    many, few = (attributes(choice)[name] for name in ("then_branch", "else_branch"))
    assert not {t.name for t in file.initializer} & {t.name for t in (*many.initializer, *few.initializer)}
    assert "model.model.embed_tokens.weight" in {tensor.name for tensor in file.initializer}
    onnx.checker.check_model(path / "model.onnx")
    for graph, op_type in ((many, "MatMulIntegerToFloat"), (few, "MatMulNBits")):
        assert sum(node.op_type == op_type for node in graph.node) == 2 * 4  # queries, keys and values are one


def test_groups_are_rounded_to_8_bits(tmp_path):
    """No further from the model than the products in blocks, whose activations alone are rounded otherwise."""
    model = quantized(tiny("llama"), scheme(4, ASYMMETRIC_8, group_size=16, symmetric=False))
    layer = next(module for module in model.modules() if isinstance(module, QuantizedLinear))
    exact, rounded = layer.qtensor().dequantize(), by_channel(layer).qtensor().dequantize()
    step = exact.abs().amax(dim=1, keepdim=True) / 127
    assert ((exact - rounded).abs() <= step / 2 * 1.001).all()
    assert (exact - rounded).abs().max() > 0
    differences = export_onnx(model, tmp_path, hybrid=True)
    assert differences["emulation"] < 1e-5 + differences["activations"] / 10  # one activation between two integers
    interface = interface_of(model)
    feed = [interface.feed(1, 2 * MANY, 0, seed=4)]
    expected = run_torch(interface, feed)
    found = relative_output_error(run_onnx(tmp_path / "model.onnx", feed), expected)
    assert (
        1e-4
        < found
        < 1.5 * relative_output_error(run_torch(copy_with_replaced_linears(interface, lower), feed), expected)
    )


def test_a_cache_goes_from_a_prompt_to_single_tokens(model, exported):
    path, _ = exported
    interface = interface_of(model)
    feed = interface.feed(1, MANY + 1, 0, seed=5)
    prompt = feed | {
        name: feed[name][:, :MANY].contiguous() for name in ("input_ids", "attention_mask", "position_ids")
    }
    _, *present = run_onnx(path / "model.onnx", [prompt])[0]
    last = feed | {name: feed[name][:, MANY:].contiguous() for name in ("input_ids", "position_ids")}
    last |= dict(zip(interface.past, map(torch.from_numpy, present), strict=True))
    (found,), (expected,) = run_onnx(path / "model.onnx", [last]), run_torch(interface, [feed])
    assert np.abs(found[0][0, -1] - expected[0][0, -1]).max() < 0.02 * np.abs(expected[0]).max()


def test_a_cache_with_room_is_written_in_place(model, exported, monkeypatch):
    """Token by token as with copies, through a growing kv_cache_buffers, and with a second prompt behind."""
    path, _ = exported
    model.config.save_pretrained(path)
    monkeypatch.setattr(kv_cache_buffers, "LEAST_CAPACITY", MANY + 4)
    decoder, copying = OnnxDecoder(path), OnnxDecoder(path)
    assert decoder.in_place_below == MANY
    copying.in_place_below = 0
    held, copied, rooms = decoder.start(), copying.start(), []
    prompt = [token % 60 for token in range(MANY)]
    for given in (prompt[:3], *([token] for token in prompt), prompt, [7], [8, 9]):
        found, held = decoder.step(given, held)
        expected, copied = copying.step(given, copied)
        assert np.abs(found - expected).max() < 1e-5
        assert held.tokens == copied.tokens == copied.capacity
        rooms.append(held.capacity)
    assert rooms == [20] * 17 + [35, 72, 72]
    before = held.values[3].data_ptr()
    assert decoder.step([5], held)[1].values[3].data_ptr() == before
    assert copying.step([5], copied)[1].values[3].data_ptr() != before


def read_elsewhere(graph):
    graph.node.append(helper.make_node("Identity", ["past_key_values.0.key"], ["copy"]))
    graph.output.append(helper.make_tensor_value_info("copy", 1, None))


def four_axes(graph):
    attention = next(node for node in graph.node if node.op_type == "Attention")
    del attention.attribute[:]


@pytest.mark.parametrize("change", [None, read_elsewhere, four_axes])
def test_what_may_not_stay_in_place_is_copied(change, tmp_path):
    """The cache is read by more than attention, or its heads are no single axis."""
    export_onnx(quantized(tiny("llama"), scheme(4, SYMMETRIC_8)), tmp_path)
    file = onnx.load(tmp_path / "model.onnx")
    if change:
        change(file.graph)
    made = onnx_ir.from_proto(file)
    assert keep_in_place(made) == (change is None)
    kinds = [node.op_type for node in made.graph]
    assert ("GroupQueryAttention" in kinds, "Attention" in kinds) == (change is None, change is not None)


@pytest.mark.parametrize(
    ("family", "activations", "options", "why"),
    [
        ("llama", None, {}, "needs a causal language model with W4A8 linears"),
        ("bert", SYMMETRIC_8, {}, "needs a causal language model with W4A8 linears"),
        ("llama", SYMMETRIC_8, {"qdq": True}, "give --qdq or --hybrid"),
    ],
)
def test_what_has_one_form_is_refused(family, activations, options, why, tmp_path):
    with pytest.raises(UsageError, match=why):
        export_onnx(quantized(tiny(family), scheme(4, activations)), tmp_path, hybrid=True, **options)
    assert not list(tmp_path.iterdir())


def test_it_is_a_form_of_onnx_files(cli, artifact_rtn, tmp_path):
    to = ("--output-dir", tmp_path / "x")
    shown = cli("export", artifact_rtn.directory, "--format", "compressed-tensors", "--hybrid", *to)
    assert (shown.code, "--hybrid belongs to --format onnx, not to compressed-tensors; leave it out" in shown.err) == (
        2,
        True,
    )
    assert not (tmp_path / "x").exists()
    shown = cli("export", artifact_rtn.directory, "--hybrid", *to)
    assert (shown.code, "leave --hybrid out" in shown.err) == (2, True)
    assert not (tmp_path / "x").exists()
