"""The GEMM kernels in Triton's interpreter against the exact integer product."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.operands import SCHEMES, activations, rng, weight

from quantize.kernels import gemm, split_k
from quantize.kernels.config import Config
from quantize.kernels.packed import pack_activations
from quantize.kernels.prepack import exact_gemm, prepack

pytestmark = pytest.mark.usefixtures("poisoned")


def both(scheme, M, N, K, symmetric_a=True, symmetric_w=True):
    """Activations, weights, and how the scheme multiplies them."""
    bits_w, bits_a, layout, variant = SCHEMES[scheme]
    qa, pw = activations(M, K, bits_a, layout, symmetric_a), weight(N, K, bits_w, symmetric=symmetric_w)
    return qa, pw, Config(block_m=16, block_n=32, variant=variant)


@pytest.mark.parametrize("symmetric_w", [True, False])
@pytest.mark.parametrize("symmetric_a", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_many_tokens_equal_the_exact_product(scheme, symmetric_a, symmetric_w):
    qa, pw, config = both(scheme, 21, 70, 300, symmetric_a, symmetric_w)
    bias = torch.randn(70, generator=rng(9))
    y = gemm.launch(qa, pw, bias, torch.float32, config)
    assert torch.equal(y, exact_gemm(qa, pw, bias, torch.float32))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_parts_of_k_change_nothing(scheme, symmetric):
    qa, pw, config = both(scheme, 3, 70, 700, symmetric, symmetric)
    expected = exact_gemm(qa, pw, None, torch.float32)
    for parts in (1, 2, 4):
        y = split_k.launch(qa, pw, None, torch.float32, replace(config, split_k=parts))
        assert torch.equal(y, expected), parts
        assert not pw.counters.any()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 16, 128), (17, 33, 129), (40, 129, 257)])
@pytest.mark.parametrize("scheme", ["W8A8", "W4A8 shift", "W4A4 pair"])
def test_ragged_shapes(scheme, shape):
    qa, pw, config = both(scheme, *shape, symmetric_a=False)
    expected = exact_gemm(qa, pw, None, torch.float32)
    assert torch.equal(gemm.launch(qa, pw, None, torch.float32, config), expected)
    assert torch.equal(split_k.launch(qa, pw, None, torch.float32, replace(config, split_k=2)), expected)


@pytest.mark.parametrize("block_k", [128, 256, 512])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_steps_of_several_blocks(scheme, block_k):
    qa, pw, config = both(scheme, 5, 40, 1024, False, False)
    y = split_k.launch(qa, pw, None, torch.float32, replace(config, block_k=block_k, split_k=2))
    assert torch.equal(y, exact_gemm(qa, pw, None, torch.float32))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("a_value", ["lowest", "highest"])
@pytest.mark.parametrize("w_value", ["lowest", "highest"])
def test_extremes(scheme, a_value, w_value):
    """All of K at the ends of both ranges, the zero points at the opposite ends."""
    bits_w, bits_a, layout, variant = SCHEMES[scheme]
    ends_a, ends_w = ({"lowest": -(1 << b - 1), "highest": (1 << b - 1) - 1} for b in (bits_a, bits_w))
    a, w = ends_a[a_value], ends_w[w_value]
    K, one = 2048, torch.ones(1, 1)
    pw = prepack(torch.full((1, K), w, dtype=torch.int8), one, torch.full((1, 1), -1 - w, dtype=torch.int8), bits_w)
    qa = pack_activations(torch.full((1, K), a, dtype=torch.int8), one[0], torch.tensor([-1 - a]), layout)
    y = gemm.launch(qa, pw, None, torch.float32, Config(variant=variant))
    assert y.item() == torch.tensor(float(K * (2 * a + 1) * (2 * w + 1))).item()


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_of_the_result(out_dtype):
    qa, pw, config = both("W4A8 shift", 4, 20, 128)
    for bias in (None, torch.randn(20, generator=rng()).to(out_dtype)):
        y = gemm.launch(qa, pw, bias, out_dtype, config)
        expected = exact_gemm(qa, pw, bias, torch.float32)
        if out_dtype == torch.bfloat16:  # the interpreter cuts the mantissa off where GPUs round it
            expected = (expected.view(torch.int32) & -65536).view(torch.float32)
        assert y.dtype == out_dtype
        assert torch.equal(y, expected.to(out_dtype))


def test_no_tokens():
    qa, pw, config = both("W4A8 shift", 0, 20, 128)
    for kernel in (gemm, split_k):
        assert kernel.launch(qa, pw, None, torch.float32, config).shape == (0, 20)
