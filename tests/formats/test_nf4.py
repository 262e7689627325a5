"""NF4: its levels, ties and bytes by hand, what it gains on Gaussian weights, and whole artifacts."""

import pytest
import torch
from helpers.weights import correlated, gram_of, output_error, weights
from safetensors.torch import load_file
from scipy.stats import norm

from quantize import load
from quantize.artifact.verify import verify_artifact
from quantize.checkpoint.opening import open_checkpoint
from quantize.errors import UsageError
from quantize.export.directory import export_artifact
from quantize.formats import check_scheme, get_format
from quantize.formats.nf4 import NF4
from quantize.formats.qtensor import QTensor
from quantize.pipeline.quantize import quantize_model
from quantize.quantizers import QUANTIZERS
from quantize.recipe.recipe import load_recipe
from quantize.scheme.scheme import ActivationArgs, Scheme, WeightArgs

ARGS = WeightArgs(num_bits=4, format="nf4", group_size=64)


def test_levels_are_quantiles_of_the_normal_distribution():
    """Appendix E: evenly spaced probabilities on each side, 8 below zero and 9 from it on, the last 0.9677083."""
    below, above = (norm.ppf(torch.linspace(0.5, 0.9677083, n).double().numpy()) for n in (8, 9))
    expected = [*(-below[:0:-1] / below[-1]), 0.0, *(above[1:] / above[-1])]
    assert pytest.approx(expected, abs=1e-6) == NF4.levels


def test_the_nearest_level_and_of_two_the_lower():
    t = torch.tensor([-3.0, -0.85, -0.84, -0.04, 0.03, 0.04, 0.86, 0.87, 9.0])
    codes = [0, 0, 1, 7, 7, 8, 14, 15, 15]  # -1 and -0.6962 meet at -0.8481, 0 and 0.0796 at 0.0398
    assert get_format("nf4").round(t, ARGS).tolist() == torch.tensor(NF4.levels)[codes].tolist()
    tie = torch.tensor([(0.7229568362236023 + 1.0) / 2], dtype=torch.float32)
    assert get_format("nf4").round(tie, ARGS).item() == pytest.approx(0.7229568)


def test_bytes_and_weights_by_hand():
    """Codes 1, 15 | 7, 0 | 8, the even column low; the largest magnitude of the group, 4, is its scale."""
    values = torch.tensor(NF4.levels)[torch.tensor([[1, 15, 7, 0, 8]])]
    assert get_format("nf4").pack(values, ARGS).tolist() == [[0xF1, 0x07, 0x08]]
    per_channel = WeightArgs(num_bits=4, format="nf4")
    W = torch.tensor([[4.0, -2.8, 0.1, 0.33, 2.3]])
    found = QUANTIZERS["rtn"]().quantize(W, per_channel, None, torch.float32)
    assert found.scale.tolist() == [[4.0]]
    assert found.dequantize().tolist()[0] == pytest.approx([4.0, -2.7847712, 0.0, 0.3183212, 2.2504680])


@pytest.mark.parametrize(("mse", "part"), [(False, 0.86), (True, 0.96)])
def test_gaussian_weights_lose_less_than_as_integers(mse, part):
    """Scales of integers are also searched among negative ones, which are better."""
    W, quantizer = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)), QUANTIZERS["rtn"](mse=mse)

    def error(**settings):
        args = WeightArgs(num_bits=4, group_size=64, **settings)
        return (quantizer.quantize(W, args, None, torch.float32).dequantize() - W).square().mean()

    assert error(format="nf4") < part * error()


def test_gptq_halves_the_held_out_error_of_rtn():
    W, X, held_out = weights(), correlated(), correlated(seed=0)[:64] + 0.01
    rtn = QUANTIZERS["rtn"]().quantize(W, ARGS, None, torch.float32)
    gptq = QUANTIZERS["gptq"]().quantize(W, ARGS, gram_of(X), torch.float32)
    assert output_error(W, gptq, held_out) <= 0.5 * output_error(W, rtn, held_out)


def test_quantized_activations_are_refused(cli, tmp_path, one_layer):
    words = "nf4 weights and int activations have no product; leave activations in floating point"
    with pytest.raises(ValueError, match=words):
        check_scheme(Scheme(weights=ARGS, activations=ActivationArgs(num_bits=8)))
    recipe = tmp_path / "nf4.toml"
    recipe.write_text('weights = { format = "nf4" }')
    shown = cli(one_layer, "--scheme", "W4A8", "--recipe", recipe, "--output-dir", tmp_path / "out")
    assert (shown.code, shown.err.count("\n")) == (2, 1)
    assert words in shown.err


def test_a_recipe_need_only_name_the_format():
    assert load_recipe("W4A16", {"weights": {"format": "nf4"}}).weights == ARGS
    assert load_recipe("W4A16", {"weights": {"format": "nf4"}}, group_size=32).weights.group_size == 32
    with pytest.raises(UsageError, match="nf4 weights need num_bits = 4 and symmetric = true, not 4 and false"):
        load_recipe("W4A16", {"weights": {"format": "nf4", "symmetric": False}})


@pytest.fixture(scope="module")
def artifact(books, tmp_path_factory):
    """books-llama's first block by GPTQ on little data."""
    recipe = {"weights": {"format": "nf4"}, "quantizer": {"name": "gptq"}}
    output, others = tmp_path_factory.mktemp("nf4") / "artifact", (r"re:.*layers\.[1-9]\d*\..*",)
    return quantize_model(books, output_dir=output, scheme="W4A16", recipe=recipe, ignore=others, nsamples=4, seqlen=64)


def test_an_artifact_is_saved_loaded_and_verified(artifact, books):
    up = "model.layers.0.mlp.up_proj"
    stored = {k: v for path in artifact.directory.glob("model-*.safetensors") for k, v in load_file(path).items()}
    rows, columns = (layer := load(artifact.directory).get_submodule(up)).out_features, layer.in_features
    assert (stored[f"{up}.qweight"].dtype, stored[f"{up}.qweight"].shape) == (torch.uint8, (rows, columns // 2))
    assert stored[f"{up}.scale"].shape == (rows, columns // 64)
    assert verify_artifact(artifact.directory)["difference"] <= 1e-5
    W = QTensor(layer.qweight, layer.scale, None, columns, ARGS).dequantize()
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), x @ W.T, rtol=1e-5, atol=1e-5)
    original = open_checkpoint(books).load().get_submodule(up).weight
    assert (W - original).norm() < 0.2 * original.norm()


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("onnx", "ONNX Runtime's CPU kernels multiply no nf4 values; quantize with one of W8A8, .* in integers"),
        ("compressed-tensors", r"compressed-tensors has no place for nf4 weights; quantize with `format = \"int\"`"),
    ],
)
def test_exports_refuse_it_with_a_reason(artifact, target, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        export_artifact(artifact.directory, target, tmp_path / "out")
    assert not (tmp_path / "out").exists()
