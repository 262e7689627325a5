"""FP4 kernels in Triton's interpreter: bytes as the reference packs them, and the scaled product."""

import pytest
import torch
from helpers.fp4_cases import ARGS, FORMATS, GROUP, SCHEMES, normal
from helpers.opcheck import CHECKS

from quantize.kernels import fp4_quantizer
from quantize.kernels.fp4 import decode_scale, encode_scale, nvfp4_global_scale, pack_fp4, quantize_fp4
from quantize.kernels.fp4_linear import choose_fp4_config, fp4_linear
from quantize.kernels.hadamard import hadamard_transform
from quantize.kernels.prologue import Prologue
from quantize.kernels.reference import quantized_linear
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.quantizers import QUANTIZERS
from quantize.transforms.online import Hadamard

pytestmark = pytest.mark.usefixtures("poisoned")


def spread(rows, columns, dtype=torch.float32):
    """Magnitudes over five decades; a group and a row of zeros."""
    x = normal(rows, columns) * torch.logspace(-3, 2, columns)
    x[0, :32], x[1:2] = 0, 0
    return x.to(dtype)


def assert_equal(found, x, name, clip_ratio=1.0):
    q, scale = quantize_fp4(x.float(), name, GROUP[name], clip_ratio)
    global_scale = None
    if name == "nvfp4":
        largest = x.float().unflatten(-1, (-1, GROUP[name])).abs().amax(-1) * clip_ratio
        global_scale = nvfp4_global_scale(largest.amax(-1, keepdim=True))
        assert torch.equal(found.global_scale, global_scale[:, 0])
    assert torch.equal(found.q, pack_fp4(q))
    assert torch.equal(found.scale, encode_scale(scale, global_scale).view(torch.uint8))
    stored = found.scale if global_scale is None else found.scale.view(torch.float8_e4m3fn)
    assert torch.equal(decode_scale(stored, global_scale), scale)


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (3, 4640)])
def test_equals_the_reference(name, dtype, rows, columns):
    x = spread(rows, columns, dtype)
    for clip_ratio in (1.0, 0.83):
        found = fp4_quantizer.launch(x, name, GROUP[name], clip_ratio)
        assert_equal(found, x, name, clip_ratio)


@FORMATS
def test_every_magnitude_of_float16(name):
    """Also of NVFP4's scales, as a row's largest group is the same in all."""
    x = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).float()
    x = torch.cat([x, -x]).reshape(16, -1)
    x[:, 0] = 65504
    assert_equal(fp4_quantizer.launch(x, name, GROUP[name]), x, name)


def test_scales_on_ties_go_to_the_even_byte():
    """In every binade of E4M3, half-way between each two bytes; the largest value makes the global scale 1."""
    bytes_ = torch.arange(1, 0x7E, dtype=torch.uint8)
    values = torch.stack([bytes_, bytes_ + 1]).view(torch.float8_e4m3fn).float()
    x = torch.zeros(126, 16)
    x[1:, 0], x[0, 0] = 6 * values.mean(0), 2688
    found = fp4_quantizer.launch(x.reshape(1, -1), "nvfp4", 16)
    assert_equal(found, x.reshape(1, -1), "nvfp4")
    assert (found.scale[0, 1:] % 2 == 0).all()


@FORMATS
@pytest.mark.parametrize("factor", [1e-44, 1e-38, 1e-36, 1e30])
def test_extremes(name, factor):
    x = spread(3, 64) * factor
    assert_equal(fp4_quantizer.launch(x, name, GROUP[name]), x, name)


@FORMATS
def test_behind_a_hadamard_transform(name):
    x = torch.randint(-30, 31, (3, 96), generator=torch.Generator().manual_seed(0), dtype=torch.int8).float()
    found = fp4_quantizer.launch(x, name, GROUP[name], prologue=Prologue(hadamard=32))
    expected, _ = quantize_fp4(hadamard_transform(x.double(), 32).float(), name, GROUP[name])
    assert (found.q != pack_fp4(expected)).float().mean() < 0.02  # ties


@pytest.mark.usefixtures("on_triton")
@FORMATS
@pytest.mark.parametrize(("M", "N", "K"), [(1, 40, 96), (20, 130, 544)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_product_equals_the_reference(name, M, N, K, dtype):
    x, size = spread(M, K, dtype), GROUP[name]
    weight = QUANTIZERS["rtn"]().quantize(normal(N, K, seed=1), ARGS[name], None, torch.float32)
    bias = normal(N, seed=2)
    y = fp4_linear(x, weight.data, weight.scale.view(torch.uint8), weight.global_scale, bias, 1.0, 0)
    expected = quantized_linear(x, weight.unpack(), weight.unpack_scale(), None, bias, 4, True, 1.0, name, size)
    assert y.dtype == dtype
    ulp = {torch.float32: 1e-6, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(y, expected, rtol=ulp, atol=1e-6 * expected.abs().max().item())


@FORMATS
def test_the_linear_is_a_proper_operator(name):
    x, weight = normal(3, 96), QUANTIZERS["rtn"]().quantize(normal(5, 96, seed=1), ARGS[name], None, torch.float32)
    stored = (weight.data, weight.scale.view(torch.uint8), weight.global_scale)
    torch.library.opcheck(fp4_linear, (x, *stored, normal(5), 0.9, 32), test_utils=CHECKS)
    expected = QuantizedLinear(weight, None, SCHEMES[name], [Hadamard(32)])(x)
    torch.testing.assert_close(fp4_linear(x, *stored, None, 1.0, 32), expected)


def test_tiles_by_architecture():
    assert choose_fp4_config(16, "sm_100")[0].block_n == 128
    assert choose_fp4_config(17, "sm_90")[0].block_m == 64
    assert [choose_fp4_config(1, arch)[1] for arch in ("interpreter", "sm_80", "sm_89", "sm_120")] == [
        True,
        True,
        True,
        False,
    ]
