"""Passes on exported graphs: each alone computes the same with the nodes it promises, and leaves alone what it must."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir
import onnxruntime
import pytest
from helpers.exporting import SYMMETRIC_8, quantized, run_onnx, scheme, tiny
from onnx import parser
from onnx_ir.passes.common import RemoveUnusedNodesPass

from quantize.export.onnx.export import interface_of
from quantize.export.onnx.lowering import lower
from quantize.export.onnx.parity import copy_with_replaced_linears, relative_output_error
from quantize.export.onnx.rewrites import rewrite
from quantize.export.onnx.rewrites.attention import CacheInAttention
from quantize.export.onnx.rewrites.heads import HeadsInPlace
from quantize.export.onnx.rewrites.merge import MergeLinears
from quantize.export.onnx.rewrites.norm import AddInNorm
from quantize.export.onnx.rewrites.tied import StoreTiedOnce, TurnTied
from quantize.export.onnx.tracing import traced

LAYERS = 2


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The graph of a Llama with grouped heads as it is traced, its feeds, and what it gives."""
    interface = interface_of(quantized(tiny("llama", LAYERS), scheme(4, SYMMETRIC_8)))
    path = tmp_path_factory.mktemp("traced") / "model.onnx"
    onnx_ir.save(traced(copy_with_replaced_linears(interface, lower)), path)
    feeds = list(interface.feeds(1).values())
    return path, feeds, run_onnx(path, feeds)


def kinds(model):
    return Counter(node.op_type for node in model.graph)


def outputs(model, feeds, tmp_path):
    onnx_ir.save(model, tmp_path / "rewritten.onnx")
    return run_onnx(tmp_path / "rewritten.onnx", feeds)


@pytest.mark.parametrize(
    ("passes", "expected"),
    [
        ([CacheInAttention], {"Attention": LAYERS, "Expand": 3}),  # those left make the mask
        ([CacheInAttention, HeadsInPlace], {"Attention": LAYERS, "Transpose": 0, "RotaryEmbedding": 2 * LAYERS}),
        ([HeadsInPlace], {"Transpose": 4 * LAYERS}),  # keys of the cache stay in heads, so queries do
        ([MergeLinears], {"MatMulNBits": 4 * LAYERS, "Split": 2 * LAYERS}),
        ([AddInNorm], {"SkipSimplifiedLayerNormalization": 2 * LAYERS, "RMSNormalization": 1}),
    ],
)
def test_a_pass_leaves_the_function(llama, passes, expected, tmp_path):
    path, feeds, before = llama
    model = onnx_ir.load(path)
    for kind in passes:
        kind()(model)
    model.opset_imports.setdefault("com.microsoft", 1)
    RemoveUnusedNodesPass()(model)
    assert relative_output_error(outputs(model, feeds, tmp_path), before) < 1e-6
    found = kinds(model)
    assert {name: found[name] for name in expected} == expected
    values = [*model.graph.initializers.values(), *(value for node in model.graph for value in node.outputs)]
    assert all(reader.graph is not None for value in values for reader in value.consumers())


def test_all_passes_together(llama, tmp_path):
    path, feeds, before = llama
    model = onnx_ir.load(path)
    nodes = len(list(model.graph))
    rewrite(model)
    assert relative_output_error(outputs(model, feeds, tmp_path), before) < 1e-6
    found = kinds(model)
    layer = {"MatMulNBits": 4, "Split": 2, "RotaryEmbedding": 2, "Attention": 1, "SkipSimplifiedLayerNormalization": 2}
    assert {name: found[name] for name in layer} == {name: LAYERS * count for name, count in layer.items()}
    assert len(list(model.graph)) == nodes - 30 * LAYERS
    assert list(onnx_ir.load(path).graph.inputs[0].shape) == ["batch_size", "sequence_length"]
    assert [value.name for value in model.graph.outputs] == [value.name for value in onnx_ir.load(path).graph.outputs]


def graph(text, **initializers):
    """A model in ONNX's text form, with initializers."""
    header = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>'
    model = onnx_ir.from_proto(parser.parse_model(header + text))
    for name, array in initializers.items():
        value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == name)
        value.const_value = onnx_ir.tensor(array, name=name)
        value.type, value.shape = onnx_ir.TensorType(value.const_value.dtype), onnx_ir.Shape(array.shape)
        model.graph.inputs[:] = [v for v in model.graph.inputs if v.name != name]
        model.graph.register_initializer(value)
    return model


def run(model, **feed):
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString())
    return session.run(None, feed)


def test_a_transpose_of_the_table_is_left_out_too():
    text = TIED.replace("float[4, 6] head", "float[6] shift").replace("MatMul (x, head)", "MatMul (x, turned)")
    model = graph(text.replace("  y =", "  turned = Transpose <perm = [1, 0]> (table)\n  y ="), table=TABLE)
    before = run(model, ids=np.array([2]), shift=np.zeros(6, np.float32))
    assert StoreTiedOnce()(model).modified
    assert kinds(model) == {"Gather": 1, "FusedMatMul": 1, "Transpose": 1}
    np.testing.assert_allclose(run(model, ids=np.array([2]), shift=np.zeros(6, np.float32))[0], before[0], rtol=1e-6)


RNG = np.random.default_rng(0)
TABLE = RNG.standard_normal((6, 4), dtype=np.float32)
TIED = """
tied (int64[N] ids, float[6, 4] table, float[4, 6] head) => (float[N, 6] y) {
  x = Gather (table, ids)
  y = MatMul (x, head)
}"""


@pytest.mark.parametrize("rewrite", [StoreTiedOnce, TurnTied])
@pytest.mark.parametrize("tied", [True, False])
def test_a_table_that_is_tied_is_stored_once(tied, rewrite):
    model = graph(TIED, table=TABLE, head=TABLE.T.copy() if tied else 2 * TABLE.T)
    ids = np.array([3, 0, 5])
    before = run(model, ids=ids)
    assert rewrite()(model).modified == tied
    assert not rewrite()(model).modified
    RemoveUnusedNodesPass()(model)
    assert list(model.graph.initializers) == ["table"] if tied else ["table", "head"]
    np.testing.assert_allclose(run(model, ids=ids)[0], before[0], rtol=1e-6)


NORM = """
norm (float[N, T, 4] a, float{shape} b, float[4] gain, float[4] shift) => (float[N, T, 4] y, float[N, T, 4] z) {{
  sum = Add (a, b)
  y = LayerNormalization <axis = {axis}, epsilon = 0.01> (sum, gain, shift)
  z = Relu (sum)
}}"""


@pytest.mark.parametrize(
    ("shape", "axis", "fused"), [("[N, T, 4]", -1, True), ("[N, T, 4]", 2, True), ("[4]", -1, False)]
)
def test_a_sum_goes_into_its_norm(shape, axis, fused):
    gains = RNG.standard_normal((2, 4), dtype=np.float32)
    model = graph(NORM.format(shape=shape, axis=axis), gain=gains[0], shift=gains[1])
    a = RNG.standard_normal((2, 3, 4), dtype=np.float32)
    b = a[::-1].copy() if fused else gains[1]
    before = run(model, a=a, b=b)
    assert AddInNorm()(model).modified == fused
    assert kinds(model)["SkipLayerNormalization"] == int(fused)
    for found, expected in zip(run(model, a=a, b=b), before, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


REPEATED = """
interleaved (float[N, 4, S, 8] q, float[N, 2, P, 8] past, float[N, 2, S, 8] new) => (float[N, 4, S, 8] y) {{
  keys = Concat <axis = -2> (past, new)
  axes = Constant <value_ints = [{axis}]> ()
  apart = Unsqueeze (keys, axes)
  sizes = Constant <value_ints = {sizes}> ()
  twice = Expand (apart, sizes)
  shape = Constant <value_ints = [0, 4, -1, 8]> ()
  heads = Reshape (twice, shape)
  y = Attention (q, heads, heads)
}}"""


@pytest.mark.parametrize(("axis", "sizes", "modified"), [(2, [1, 1, 2, 1, 1], True), (1, [1, 2, 1, 1, 1], False)])
def test_heads_that_are_repeated_in_another_order_are_left_alone(axis, sizes, modified):
    model = graph(REPEATED.format(axis=axis, sizes=sizes))
    for node in model.graph:  # as the exporter notes them
        if node.op_type == "Reshape":
            node.outputs[0].shape = onnx_ir.Shape(["N", 4, "T", 8])
    feed = {name: RNG.standard_normal((1, heads, tokens, 8), dtype=np.float32) for name, heads, tokens in
            [("q", 4, 2), ("past", 2, 3), ("new", 2, 2)]}  # fmt: skip
    before = run(model, **feed)
    assert CacheInAttention()(model).modified == modified
    np.testing.assert_allclose(run(model, **feed)[0], before[0], rtol=1e-5, atol=1e-6)


MASKED = """
masked (float[N, 2, S, 8] q, float[N, 2, P, 8] past, float[N, 2, S, 8] new) => (float[N, 2, S, 8] y) {
  keys = Concat <axis = -2> (past, new)
  last = Constant <value_ints = [-1]> ()
  sums = ReduceSum <keepdims = 0> (keys, last)
  axis = Constant <value_ints = [2]> ()
  mask = Unsqueeze (sums, axis)
  y = Attention (q, keys, keys, mask)
}"""


def test_attention_whose_mask_is_made_of_its_keys_appends_them_first():
    """Doge hides tokens by what their values are; an attention that appends them itself would wait for itself."""
    model = graph(MASKED)
    feed = {name: RNG.standard_normal((1, 2, tokens, 8), dtype=np.float32) for name, tokens in
            [("q", 1), ("past", 3), ("new", 1)]}  # fmt: skip
    before = run(model, **feed)
    rewrite(model)
    np.testing.assert_allclose(run(model, **feed)[0], before[0], rtol=1e-5, atol=1e-6)
