"""FP4 by hand-sized numbers: every code, the scale of each format, rounding, bytes, products, and whole artifacts."""

import math
from itertools import pairwise

import pytest
import torch
from helpers.fp4_cases import ARGS, FORMATS, GROUP, SCHEMES, normal
from helpers.weights import correlated, gram_of, output_error, weights
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from quantize import load
from quantize.artifact.verify import verify_artifact
from quantize.errors import UsageError
from quantize.export.onnx.lowering import lower
from quantize.formats import check_args, check_scheme
from quantize.formats.qtensor import QTensor
from quantize.kernels.fp4 import (
    MAGNITUDES,
    decode_scale,
    encode_scale,
    fp4_scale,
    pack_fp4,
    quantize_fp4,
    round_to_e2m1,
    unpack_fp4,
)
from quantize.kernels.ops import dequantize, quantized_linear
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.quantizers import QUANTIZERS
from quantize.quantizers.base import compute_qparams, grouped, quantization_error
from quantize.recipe.recipe import load_recipe
from quantize.scheme.scheme import Scheme, WeightArgs

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def test_all_sixteen_codes():
    packed = torch.arange(16, dtype=torch.uint8)[:, None]
    assert (unpack_fp4(packed, 1)[:, 0] / 2).tolist() == E2M1 + [-value for value in E2M1]
    values = torch.tensor([[0, 1, -1, 12, -12, 4, 6, -8]], dtype=torch.int8)
    assert pack_fp4(values).tolist() == [[0x10, 0x79, 0x4F, 0xE5]]  # the even index low


@given(st.lists(st.sampled_from([*MAGNITUDES, *(-m for m in MAGNITUDES)]), min_size=1, max_size=33))
def test_unpack_inverts_pack(values):
    q = torch.tensor([values], dtype=torch.int8)
    assert torch.equal(unpack_fp4(pack_fp4(q), len(values)), q)


def test_ties_go_to_the_even_mantissa():
    """Half-way between neighbours of the codes 0 and 1, 1 and 2, …: the even code wins."""
    middle = torch.tensor([a + b for a, b in pairwise(E2M1)])  # doubled, as the integers are
    assert round_to_e2m1(middle).tolist() == [0, 2, 2, 4, 4, 8, 8]
    assert round_to_e2m1(-middle).tolist() == [0, -2, -2, -4, -4, -8, -8]


@given(st.floats(-20, 20, width=32))
def test_rounding_finds_the_nearest(x):
    grid = torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)], dtype=torch.float32)
    found = round_to_e2m1(torch.tensor(x)).item()
    assert found in grid
    assert abs(found - x) == (grid - x).abs().min().item()


@pytest.mark.parametrize("largest", [6.0, 7.99, 4.0, 1.0, 3e-5, 2.0**-126, 3e38])
def test_mxfp4_scales_are_powers_of_two_by_the_specification(largest):
    scale = fp4_scale(torch.tensor([largest]), None)
    exponent = max(math.floor(math.log2(largest)) - 2, -126)
    assert 2 * scale.item() == 2.0**exponent
    assert encode_scale(scale, None).tolist() == [exponent + 127]
    assert torch.equal(decode_scale(encode_scale(scale, None), None), scale)


def test_mxfp4_by_hand():
    """The largest magnitude 7 has the scale 1 and saturates at 6."""
    x = torch.zeros(1, 64)
    x[0, :5], x[0, 32] = torch.tensor([7.0, -2.6, 0.75, 0.2, 5.0]), 0.7
    q, scale = quantize_fp4(x, "mxfp4", 32)
    assert q[0, :5].tolist() == [12, -6, 2, 0, 8]
    assert q[0, 32] == 12  # 0.7 in units of 1/8 is 5.6
    assert scale.tolist() == [[0.5, 0.0625]]


def test_nvfp4_by_hand():
    """The global scale puts the token's largest magnitude on 6 · 448.

    A group with largest 3.3 gets E4M3(448 · 3.3 / 6 / 2).
    """
    x = torch.zeros(2, 32)
    x[0, 0], x[0, 16:18] = 12.0, torch.tensor([3.3, -1.0])
    x[1, 0] = 0.5
    q, scale = quantize_fp4(x, "nvfp4", 16)
    global_scale = 12 / 6 / 448  # a token's own: the other token's is smaller
    assert q[0, 0] == q[1, 0] == 12
    assert q[0, 16:18].tolist() == [12, -4]
    assert scale[0].tolist() == pytest.approx(
        [448 * global_scale / 2, 120 * global_scale / 2]
    )  # 123.2 lies between 120 and 128
    assert scale[1, 0].item() == pytest.approx(0.5 / 12)


@pytest.mark.parametrize("global_scale", [None, torch.tensor(3.7e-4)])
def test_scales_survive_their_byte(global_scale):
    scale = fp4_scale(torch.logspace(-9, 3, 200), global_scale)
    stored = encode_scale(scale, global_scale)
    assert (scale > 0).all()
    assert stored.element_size() == 1
    assert torch.equal(decode_scale(stored, global_scale), scale)


@FORMATS
def test_zeros_stay_zeros(name):
    q, scale = quantize_fp4(torch.zeros(2, 64), name, GROUP[name])
    assert not q.any()
    assert (scale > 0).all()
    quantized = QUANTIZERS["rtn"](mse=True).quantize(torch.zeros(2, 64), ARGS[name], None, torch.float32)
    assert not quantized.dequantize().any()


def test_clipping_saturates():
    x = torch.tensor([[6.0, 3.0] + [0.0] * 30])
    q, scale = quantize_fp4(x, "mxfp4", 32, clip_ratio=0.5)
    assert (q[0, :2].tolist(), scale.item()) == ([12, 12], 0.25)


@FORMATS
def test_quantized_linear_equals_the_dequantized_product(name):
    x, size = normal(5, 96) * torch.logspace(-2, 1, 96), GROUP[name]
    weight = QUANTIZERS["rtn"]().quantize(normal(7, 96, seed=1), ARGS[name], None, torch.float32)
    bias = normal(7, seed=2)
    y = quantized_linear(x, weight.unpack(), weight.unpack_scale(), None, bias, 4, True, 1.0, name, size)
    q, scale = quantize_fp4(x, name, size)
    assert scale.shape == (5, 96 // size)
    expected = dequantize(q, scale, None).double() @ weight.dequantize().double().T + bias.double()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    layer = QuantizedLinear(weight, bias, SCHEMES[name])
    torch.testing.assert_close(layer(x), y, rtol=0, atol=0)
    torch.testing.assert_close(layer.fake_quantized(x), y, rtol=1e-5, atol=1e-5)


@FORMATS
def test_half_precision_sums_groups_in_float32(name):
    layer = QuantizedLinear(
        QUANTIZERS["rtn"]().quantize(normal(8, 512, seed=1), ARGS[name], None, torch.float32), None, SCHEMES[name]
    )
    x = normal(3, 512).bfloat16()
    assert torch.equal(layer(x), layer(x.float()).bfloat16())


@FORMATS
def test_rtn_takes_the_nearest_and_mse_only_improves(name):
    W, args = normal(16, 64), ARGS[name]
    rtn, mse = (QUANTIZERS["rtn"](mse=m).quantize(W, args, None, torch.float32) for m in (False, True))
    codes = torch.tensor(E2M1 + [-value for value in E2M1])
    blocks = grouped(W, args)[..., None] - 2 * rtn.unpack_scale()[..., None, None] * codes
    nearest = blocks.abs().amin(dim=-1).flatten(1)
    torch.testing.assert_close((rtn.dequantize() - W).abs(), nearest)
    assert (mse.dequantize() - W).square().mean() < 0.99 * (rtn.dequantize() - W).square().mean()
    scale, zero_point = compute_qparams(W, args, torch.float32, mse=True, global_scale=mse.global_scale)
    torch.testing.assert_close(scale, mse.unpack_scale(), rtol=0, atol=0)  # what is stored is what was rounded with
    error = quantization_error(grouped(W, args), scale[..., None], zero_point[..., None], args, 1.0)
    torch.testing.assert_close(error.sum(), (mse.dequantize() - W).square().sum())


@FORMATS
def test_gptq_halves_the_held_out_error_of_rtn(name):
    W, X, held_out = weights(), correlated(), correlated(seed=0)[:64] + 0.01
    rtn = QUANTIZERS["rtn"]().quantize(W, ARGS[name], None, torch.float32)
    gptq = QUANTIZERS["gptq"]().quantize(W, ARGS[name], gram_of(X), torch.float32)
    assert output_error(W, gptq, held_out) <= 0.5 * output_error(W, rtn, held_out)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            {"num_bits": 8, "format": "mxfp4", "group_size": 32},
            "mxfp4 weights need .* group_size = 32.* not 8, true and",
        ),
        ({"num_bits": 4, "format": "mxfp4", "group_size": 16}, "mxfp4 weights need .* not 4, true and 16"),
        (
            {"num_bits": 4, "format": "nvfp4", "group_size": 32},
            "nvfp4 weights need .* group_size = 16.* not 4, true and",
        ),
        ({"num_bits": 4, "format": "nvfp4", "group_size": 16, "symmetric": False}, "need .* not 4, false and 16"),
    ],
)
def test_fp4_weights_are_what_the_format_says(args, words):
    with pytest.raises(ValueError, match=words):
        check_args(WeightArgs(**args))


def test_formats_do_not_mix():
    mixed = Scheme(weights=WeightArgs(num_bits=4), activations=SCHEMES["mxfp4"].activations)
    with pytest.raises(ValueError, match=r"int weights and mxfp4 activations have no product; give .* the format int$"):
        check_scheme(mixed)


@pytest.mark.parametrize(
    ("scheme", "changes", "words"),
    [
        ("MXFP4", {"weights": {"group_size": 64}}, "^recipe: weights: mxfp4 weights need .* not 4, true and 64$"),
        ("NVFP4", {"activations": {"symmetric": False}}, "^recipe: activations: nvfp4 .* not 4 and false$"),
        ("NVFP4", {"activations": {"num_bits": 8}}, "^recipe: activations: nvfp4 activations need num_bits = 4"),
        ("MXFP4", {"activations": {"format": "int"}}, "MXFP4 stands for the format mxfp4, .* say mxfp4 and int; leave"),
        ("W4A4", {"activations": {"format": "mxfp4", "symmetric": True}}, "W4A4 stands for the format int, the tables"),
        (
            "MXFP4",
            {"activations": None},
            "MXFP4 stands for 4-bit weights and 4-bit activations, the tables say 4 and 16",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_its_scheme_is_refused(scheme, changes, words):
    with pytest.raises(UsageError, match=words) as raised:
        load_recipe(scheme, changes)
    assert "\n" not in str(raised.value)


@FORMATS
def test_onnx_refuses_it(name):
    weight = QUANTIZERS["rtn"]().quantize(normal(8, 32), ARGS[name], None, torch.float32)
    with pytest.raises(UsageError, match=f"CPU kernels multiply no {name} values; quantize with one of W8A8"):
        lower(QuantizedLinear(weight, None, SCHEMES[name]))


def test_columns_that_the_group_does_not_divide(small_run, one_layer):
    with pytest.raises(
        UsageError, match=r"size 32 does not divide the 172 columns of .*down_proj; leave out with --ig"
    ):
        small_run(one_layer, "MXFP4", group_size=None)


@FORMATS
def test_an_artifact_is_saved_loaded_and_verified(name, one_layer, small_run, float_stories):
    settings = {"group_size": None, "ignore": ["down_proj"], "recipe": {"passes": []}}
    artifact = small_run(one_layer, name.upper(), **settings)
    stored = {k: v for path in artifact.directory.glob("model-*.safetensors") for k, v in load_file(path).items()}
    up, rows, groups = "model.layers.0.mlp.up_proj", 172, 64 // GROUP[name]
    assert stored[f"{up}.qweight"].shape == (rows, 32)
    assert stored[f"{up}.scale"].shape == (rows, groups)
    bits = 8 * sum(t.nbytes for key, t in stored.items() if key.startswith(up)) / (rows * 64)
    assert bits == pytest.approx(4 + 8 / GROUP[name], abs=0.01)
    assert (f"{up}.global_scale" in stored) == (name == "nvfp4")
    assert verify_artifact(artifact.directory)["difference"] <= 1e-5
    for dtype in (torch.float32, torch.bfloat16):  # scales stay as they are in any dtype
        layer = load(artifact.directory, dtype).get_submodule(up)
        again = QTensor(layer.qweight, layer.scale, None, 64, ARGS[name], layer.global_scale)
        torch.testing.assert_close(again.dequantize(), layer.qtensor().dequantize(), rtol=0, atol=0)
        assert layer.scale.dtype == stored[f"{up}.scale"].dtype
    W = float_stories.get_submodule(up).weight
    assert (again.dequantize() - W).norm() < 0.25 * W.norm()
