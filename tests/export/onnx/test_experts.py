"""Stacks of experts in ONNX: one operator for all, or a product for each on the rows of its tokens."""

from __future__ import annotations

import json
from collections import Counter

import onnx
import pytest
import torch
from helpers.mixtures import build_family
from torch import nn
from torch.nn import functional
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from quantize.errors import QuantizeError
from quantize.export.directory import export_artifact
from quantize.export.onnx.complex_pairs import MADE
from quantize.export.onnx.fused_experts import FusedExperts, fused
from quantize.export.onnx.gathered_experts import GatheredExperts, lowered_copy
from quantize.export.onnx.lowering import lower
from quantize.export.swiglu import SwiGLU, swiglu_of
from quantize.nn.quantized_experts import QuantizedExperts, replace_parameter
from quantize.quantizers.rtn import RoundToNearest
from quantize.scheme.scheme import ActivationArgs, Scheme, WeightArgs
from quantize.transforms.online.hadamard import Hadamard

E, N, K = 3, 6, 32


def stack(bits, activations=None, transposed=False, rows=N):
    W, args = torch.randn(E * rows, K, generator=torch.Generator().manual_seed(0)), WeightArgs(num_bits=bits)
    scheme = Scheme(weights=args, activations=activations and ActivationArgs(num_bits=activations))
    weight = RoundToNearest().quantize(W, args, None, torch.float32)
    return QuantizedExperts(weight, None, scheme, (), E, transposed)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("bits", "activations"), [(4, None), (4, 8), (4, 4), (8, 8)])
def test_each_row_is_multiplied_by_its_expert(bits, activations, transposed):
    """As each expert's lowered linear multiplies it; expert 1 has no rows."""
    experts = stack(bits, activations, transposed)
    gathered = GatheredExperts(experts, lower)
    x, numbers = torch.randn(5, 1, K, generator=torch.Generator().manual_seed(1)), torch.tensor([2, 0, 2, 2, 0])
    W = gathered[numbers]
    found = torch.bmm(x, W if transposed else W.mT)
    for row, number in enumerate(numbers.tolist()):
        torch.testing.assert_close(found[row], lower(experts.expert(number))(x[row]))
    together = torch.randn(E, 4, K, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(gathered(together)[1], lower(experts.expert(1))(together[1]))
    torch.testing.assert_close(gathered.expert_product(2, together), lower(experts.expert(2))(together))


def test_code_that_needs_all_weights_is_refused():
    gathered = GatheredExperts(stack(4), lower)
    with pytest.raises(QuantizeError, match="a way that ONNX has no product for"):
        torch.mul(torch.zeros(E, N, K), gathered)
    with pytest.raises(QuantizeError, match="rows sorted by expert have no place"):
        gathered(torch.zeros(2, K), torch.tensor([2, 2, 2]))


def test_a_lowered_copy_leaves_the_model_as_it_was():
    model = build_family("mixtral", num_hidden_layers=1)
    before = model.config._experts_implementation
    assert lowered_copy(model, lower).config._experts_implementation == "batched_mm" != before
    assert model.config._experts_implementation == before


@pytest.mark.slow
def test_a_mixture_runs_in_onnx_runtime(artifact_mixture, tmp_path):
    parity = export_artifact(artifact_mixture.directory, "onnx", tmp_path / "onnx")
    assert parity["emulation"] < 1e-5 < parity["activations"]
    assert (parity["top1"], abs(parity["kl"]) < 1e-3) == (1, True)
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph
    assert [node.op_type for node in graph.node].count("QMoE") == 1
    config = json.loads((tmp_path / "onnx" / "ort_config.json").read_text())
    assert config["precisions"]["4-bit weights, 8-bit activations in blocks of 16"] == 2 * 4 + 4  # experts, attention


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes", "standard", "fused"),
    [
        ("mixtral", {"ignore": ["re:.*experts.*"]}, False, 0),  # experts in floating point
        ("mixtral", {}, True, 0),
        ("gpt_oss", {}, False, 1),  # [experts, K, N], gates and linear values in turns, biases, limits
        ("llama4_text", {}, False, 0),  # whose class multiplies as no other does, and rotates by complex numbers
    ],
)
def test_other_mixtures(family, changes, standard, fused, artifact_mixture, small_run, tmp_path):
    build_family(family, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    recipe = {"passes": [], "quantizer": {"name": "rtn"}, **changes}
    ids = artifact_mixture.directory.parent / "ids.jsonl"
    artifact = small_run(tmp_path / "model", "W4A16", recipe=recipe, calibration=ids, group_size=16)
    parity = export_artifact(artifact.directory, "onnx", tmp_path / "onnx", qdq=standard)
    assert parity["reference"] < 1e-5
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph
    found = Counter(node.op_type for node in graph.node)
    assert found["QMoE"] == fused
    assert not (standard and found["MatMulNBits"])


def plain(x):
    g, linear = x.chunk(2, dim=-1)
    return functional.silu(g) * linear


def limited(x):
    """Compute what lies between the products of gpt-oss."""
    g, linear = x[..., ::2].clamp(max=7), x[..., 1::2].clamp(-7, 7)
    return (linear + 1) * g * torch.sigmoid(1.702 * g)


def test_a_swiglu_is_found_by_its_values():
    assert swiglu_of(plain, 8) == SwiGLU(interleaved=False)
    found = swiglu_of(limited, 8)
    assert (found.alpha, found.beta, found.limit) == pytest.approx((1.702, 1, 7))


@pytest.mark.parametrize(
    "other",
    [
        lambda x: functional.gelu(x[..., :4]) * x[..., 4:],
        lambda x: functional.silu(x[..., 4:]) * x[..., :4],  # the gate is the second half
        lambda x: functional.silu(x[..., :4]).clamp(max=5) * x[..., 4:],  # limited behind the activation
        lambda x: functional.relu(x[..., :4]) * x[..., 4:],
        lambda x: plain(x) + 1e-3,
    ],
)
def test_what_is_no_swiglu_is_none(other):
    assert swiglu_of(other, 8) is None


@pytest.mark.parametrize("change", ["online", "float zero points", "gate", "bits", "norm"])
def test_a_layer_of_another_form_has_a_product_for_each_expert(change):
    layer = MixtralExperts(MixtralConfig(hidden_size=K, intermediate_size=K, num_local_experts=E))
    replace_parameter(layer, "gate_up_proj", stack(4, rows=2 * K))
    replace_parameter(layer, "down_proj", stack(4, rows=K))
    assert isinstance(fused(layer, lower), FusedExperts)
    if change == "online":
        layer.down_proj.online = (Hadamard(K),)
    elif change == "float zero points":
        layer.down_proj.drop_laid_out()
        layer.down_proj.zero_point = torch.zeros_like(layer.down_proj.scale)
    elif change == "gate":
        layer.act_fn = nn.GELU()
    elif change == "bits":
        replace_parameter(layer, "gate_up_proj", stack(8, 8, rows=2 * K))
    else:
        layer.has_post_expert_norm = True
    assert fused(layer, lower) is None


def test_complex_numbers_are_pairs():
    """What Llama 4 computes with them, and that other functions are refused."""
    angles, x = torch.randn(3, 4), torch.randn(2, 3, 4, 2)

    def rotated(polar, view_as_complex):
        turns = polar(torch.ones_like(angles), angles) * 0.5
        return torch.view_as_real(view_as_complex(x) * turns[None].to(x.device)).flatten(2)

    torch.testing.assert_close(
        rotated(MADE[torch.polar], MADE[torch.view_as_complex]), rotated(torch.polar, torch.view_as_complex)
    )
    with pytest.raises(RuntimeError, match="`exp` of a complex-valued input has no form"):
        torch.exp(MADE[torch.polar](angles, angles))
