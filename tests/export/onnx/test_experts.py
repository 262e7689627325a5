"""Stacks of experts in ONNX: a product for each expert on the rows of its tokens."""

from __future__ import annotations

import onnx
import pytest
import torch
from helpers.mixtures import build_family

from quantize.errors import QuantizeError
from quantize.export.directory import export_artifact
from quantize.export.onnx.gathered_experts import GatheredExperts, lowered_copy
from quantize.export.onnx.lowering import lower
from quantize.nn.quantized_experts import QuantizedExperts
from quantize.quantizers.rtn import RoundToNearest
from quantize.scheme.scheme import ActivationArgs, Scheme, WeightArgs

E, N, K = 3, 6, 32


def stack(bits, activations=None, transposed=False):
    W, args = torch.randn(E * N, K, generator=torch.Generator().manual_seed(0)), WeightArgs(num_bits=bits)
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
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(products) >= 2 * 4 + 2  # of four experts, and of attention


@pytest.mark.slow
@pytest.mark.parametrize(("family", "ignore"), [("mixtral", ["re:.*experts.*"]), ("gpt_oss", None)])
def test_other_mixtures(family, ignore, artifact_mixture, small_run, tmp_path):
    """Experts in floating point, and as [experts, K, N]."""
    build_family(family, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    recipe = {"passes": [], "quantizer": {"name": "rtn"}, "ignore": ignore}
    ids = artifact_mixture.directory.parent / "ids.jsonl"
    artifact = small_run(tmp_path / "model", "W4A16", recipe=recipe, calibration=ids, group_size=16)
    parity = export_artifact(artifact.directory, "onnx", tmp_path / "onnx")
    assert parity["reference"] < 1e-5
