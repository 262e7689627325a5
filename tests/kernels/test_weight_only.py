"""The kernel for activations in floating point, in Triton's interpreter, beside the product in float64."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from helpers.operands import rng

from quantize.kernels import engine, weight_only_gemm
from quantize.kernels import weight_only_linear as weight_only_linear_module
from quantize.kernels.config import Config
from quantize.kernels.packing import pack_int4
from quantize.kernels.reference import dequantize
from quantize.kernels.weight_only_linear import weight_only_linear

pytestmark = pytest.mark.usefixtures("poisoned")
CLOSE = {torch.float32: 2e-6, torch.float16: 2e-3}  # the interpreter computes bfloat16 products wrongly


def operands(N, K, G, bits, symmetric, M, dtype):
    low, high = -(1 << bits - 1), 1 << bits - 1
    q = torch.randint(low, high, (N, K), generator=rng(0), dtype=torch.int8)
    scale = torch.rand(N, G, generator=rng(1)) + 0.1
    zero = None if symmetric else torch.randint(low, high, (N, G), generator=rng(2), dtype=torch.int8)
    x = torch.randn(M, K, generator=rng(3)).to(dtype)
    return x, q, scale, zero


def expected(x, q, scale, zero, bias):
    W = dequantize(q, scale.double(), zero).double()
    return x.double() @ W.T + (0 if bias is None else bias.double())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(("K", "G", "parts"), [(200, 1, 1), (192, 3, 1), (192, 2, 1), (256, 2, 3), (203, 1, 2)])
def test_products(bits, symmetric, dtype, K, G, parts):
    x, q, scale, zero = operands(70, K, G, bits, symmetric, 19, dtype)
    bias = torch.randn(70, generator=rng(4)).to(dtype)
    config = Config(16, 32, 256, parts)
    data = pack_int4(q) if bits == 4 else q
    by_group = (scale.T.contiguous(), None if zero is None else zero.T.contiguous())
    found = weight_only_gemm.launch(x, data, *by_group, None, bias, bits, config)
    wanted = expected(x, q, scale, zero, bias)
    assert found.dtype == dtype
    assert float((found.double() - wanted).norm() / wanted.norm()) < CLOSE[dtype]


@triton.jit
def words_kernel(y: tl.tensor, w: tl.tensor, DTYPE: tl.constexpr) -> None:
    """Store what sixteen columns of one channel become, float32 [16]."""
    found = weight_only_gemm.floats_of_words(w, tl.arange(0, 1), 0, 1, 2, 1, 16, DTYPE)
    tl.store(y + tl.arange(0, 16)[None, :], found.to(tl.float32))


@pytest.mark.parametrize(("dtype", "base"), [(tl.float16, 1032), (tl.bfloat16, 136)])
def test_all_nibbles_become_floats_in_the_order_of_their_columns(dtype, base):
    q = torch.tensor([[3, -8, 7, 0, -1, 5, -4, 2, 1, -2, 6, -7, 4, -5, -3, -6]], dtype=torch.int8)
    found = torch.zeros(16)
    words_kernel[(1,)](found, pack_int4(q).view(torch.int32), dtype)
    assert torch.equal(found, q[0].float() + base)


def test_a_product_by_hand():
    """W = (q - z) · s in two groups of 16 columns: (1 - 3) · 2 = -4, then (5 + 1) · 0.5 = 3; x is 1, then 2."""
    q = torch.tensor([[1] * 16 + [5] * 16], dtype=torch.int8)
    x = torch.tensor([[1.0] * 16 + [2.0] * 16])
    scale, zero = torch.tensor([[2.0, 0.5]]), torch.tensor([[3, -1]], dtype=torch.int8)
    by_group = (scale.T.contiguous(), zero.T.contiguous())
    found = weight_only_gemm.launch(x, pack_int4(q), *by_group, None, torch.tensor([0.25]), 4, Config(16, 16, 16))
    assert found.item() == 16 * -4 + 16 * 2 * 3 + 0.25


def test_no_tokens():
    x, q, scale, zero = operands(8, 64, 2, 4, False, 0, torch.float32)
    assert weight_only_gemm.launch(x, pack_int4(q), scale.T, zero.T, None, None, 4, Config(16, 16, 32)).shape == (0, 8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(("K", "G"), [(256, 2), (203, 1), (192, 3)])
def test_weights_are_dequantized_exactly(bits, dtype, K, G):
    _, q, scale, zero = operands(70, K, G, bits, False, 1, dtype)
    data = pack_int4(q) if bits == 4 else q
    found = weight_only_gemm.dequantize(data, scale.T.contiguous(), zero.T.contiguous(), None, bits, K, dtype)
    assert torch.equal(found, dequantize(q, scale, zero).to(dtype))


def test_the_operator_is_the_same_on_both_engines(monkeypatch):
    monkeypatch.setattr(weight_only_linear_module, "MANY_TOKENS", 6)
    for tokens in (5, 7):
        x, q, scale, zero = operands(40, 96, 3, 4, False, tokens, torch.float32)
        given = (x, pack_int4(q), scale.T.contiguous(), zero.T.contiguous(), None, None, 4)
        monkeypatch.setattr(engine, "runs_on_triton", lambda _: False)
        there = weight_only_linear(*given)
        monkeypatch.setattr(engine, "runs_on_triton", lambda _: True)
        torch.testing.assert_close(weight_only_linear(*given), there, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(("K", "G", "parts"), [(192, 3, 1), (203, 1, 2)])
def test_codes_are_looked_up(dtype, K, G, parts):
    x, q, scale, _ = operands(70, K, G, 4, True, 19, dtype)
    levels = torch.randn(16, generator=rng(5)).half().float()
    found = weight_only_gemm.launch(
        x, pack_int4(q), scale.T.contiguous(), None, levels, None, 4, Config(16, 32, 256, parts)
    )
    wanted = expected(x, levels[(q & 15).int()], scale, None, None)
    assert float((found.double() - wanted).norm() / wanted.norm()) < CLOSE[dtype]


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(("K", "G"), [(192, 3), (203, 1)])
def test_zero_points_between_integers(dtype, K, G):
    x, q, scale, _ = operands(70, K, G, 4, True, 19, dtype)
    zero = (20 * torch.randn(70, G, generator=rng(2))).half()
    by_group = (scale.T.contiguous(), zero.T.contiguous())
    found = weight_only_gemm.launch(x, pack_int4(q), *by_group, None, None, 4, Config(16, 32, 64))
    wanted = expected(x, q, scale, zero, None)
    assert float((found.double() - wanted).norm() / wanted.norm()) < CLOSE[dtype]
