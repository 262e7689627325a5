"""Stacks of experts in ordinary checkpoints: under the names of the float model, and with its function."""

import pytest
import torch
from helpers.mixtures import build_family
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from quantize.artifact.load import load
from quantize.errors import QuantizeError
from quantize.export.comparison import copy_with_replaced_linears, relative_error, with_float_activations
from quantize.export.directory import export_artifact
from quantize.export.safetensors_float import export
from quantize.export.safetensors_float.dequantize import float_stack, stack_with_noise
from quantize.graph.export import quiet
from quantize.nn.quantized_experts import QuantizedExperts
from quantize.quantizers.rtn import RoundToNearest
from quantize.scheme.scheme import Scheme, WeightArgs
from quantize.transforms.online import hadamard

TARGET = "safetensors-float"


def test_an_ordinary_checkpoint_of_a_mixture(artifact_mixture, tmp_path):
    parity = export_artifact(artifact_mixture.directory, TARGET, tmp_path / "out")
    assert parity["reference"] < 2e-6 < 1e-3 < parity["activations"]
    saved = {name: x.shape for path in (tmp_path / "out").glob("*.safetensors") for name, x in load_file(path).items()}
    original = load_file(artifact_mixture.directory.parent / "model" / "model.safetensors")
    assert saved == {name: x.shape for name, x in original.items()}
    ids = torch.arange(2, 34)[None]
    model = load(artifact_mixture.directory)
    with quiet(), torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
        exact = copy_with_replaced_linears(model, with_float_activations, with_float_activations)(ids).logits
        assert relative_error([found], [exact]) < 2e-6
        assert relative_error([found], [model(ids).logits]) > 1e-3


@pytest.mark.parametrize("transposed", [False, True])
def test_a_stack_is_the_same_function(transposed):
    W = torch.randn(3 * 6, 8, generator=torch.Generator().manual_seed(0))
    args = WeightArgs(num_bits=4, group_size=4, symmetric=False)
    weight = RoundToNearest().quantize(W, args, None, torch.float32)
    stack = QuantizedExperts(weight, None, Scheme(weights=args), (hadamard(8),), 3, transposed)
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    found = float_stack(stack, torch.float32)
    assert found.shape == ((3, 8, 6) if transposed else (3, 6, 8))
    torch.testing.assert_close(x @ (found if transposed else found.mT), stack(x))
    off = (stack_with_noise(stack, 0.01) - found).abs()
    assert 0.009 < float((off / found.abs())[found.abs() > 1e-3].max()) <= 0.0101


def test_a_stack_that_computes_something_else_is_noticed(artifact_mixture, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "float_stack", lambda experts, dtype: float_stack(experts, dtype).flip(1))
    with pytest.raises(QuantizeError, match="transformers differs from the artifact by"):
        export_artifact(artifact_mixture.directory, TARGET, tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text"])
def test_stacks_that_lie_the_other_way_round(family, tmp_path, small_run, artifact_mixture):
    build_family(family, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    recipe = {"passes": [{"name": "rotate"}], "quantizer": {"name": "rtn"}}
    ids = artifact_mixture.directory.parent / "ids.jsonl"
    artifact = small_run(tmp_path / "model", "W4A4", recipe=recipe, calibration=ids)
    parity = export_artifact(artifact.directory, TARGET, tmp_path / "checkpoint")
    assert parity["reference"] < 2e-6 < 1e-2 < parity["activations"]
