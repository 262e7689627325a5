"""The byte layout and the integer arithmetic that every engine is held to, by hand-sized numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantize.formats.qtensor import QTensor
from quantize.kernels.ops import dequantize, pack_int4, quantize_per_token, quantized_linear, unpack_int4
from quantize.kernels.reference import integer_matmul, scale_and_zero_point
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.scheme.scheme import ActivationArgs, Scheme, WeightArgs
from quantize.transforms.online import Hadamard


def test_pack_int4_bytes():
    assert pack_int4(torch.tensor([[1, -1, 7, -8, 3]], dtype=torch.int8)).tolist() == [[0xF1, 0x87, 0x03]]


@given(st.lists(st.integers(-8, 7), min_size=1, max_size=33))
def test_unpack_inverts_pack(values):
    q = torch.tensor([values], dtype=torch.int8)
    assert torch.equal(unpack_int4(pack_int4(q), len(values)), q)


def test_symmetric_token_by_hand():
    q, scale, zero_point = quantize_per_token(torch.tensor([[-7.0, 3.4, 1.5, 0.5]]), 4, symmetric=True)
    assert (q.tolist(), scale.item(), zero_point.item()) == ([[-7, 3, 2, 0]], 1.0, 0)  # halves to even


def test_asymmetric_token_by_hand():
    q, scale, zero_point = quantize_per_token(torch.tensor([[-2.0, 13.0, 0.0]]), 4, symmetric=False)
    assert (q.tolist(), scale.item(), zero_point.item()) == ([[-8, 7, -6]], 1.0, -6)


def test_clip_ratio_saturates():
    q, _, _ = quantize_per_token(torch.tensor([[-14.0, 14.0, 3.5]]), 4, symmetric=True, clip_ratio=0.5)
    assert q.tolist() == [[-8, 7, 4]]


def test_grid_of_a_positive_range_keeps_zero_exact():
    scale, zero_point = scale_and_zero_point(torch.tensor(5.0), torch.tensor(15.0), 4, symmetric=False)
    assert (scale.item(), zero_point.item()) == (1.0, -8.0)


def test_integer_matmul_is_exact_where_float32_is_not():
    a, b = torch.full((1, 40000), 127, dtype=torch.int8), torch.full((1, 40000), 127, dtype=torch.int8)
    b[0, 0] = 126
    assert integer_matmul(a, b).item() == 127 * 127 * 40000 - 127


def test_dequantize_by_hand():
    q, scale = torch.tensor([[1, 7, -8, 0]], dtype=torch.int8), torch.tensor([[2.0, 0.5]])
    assert dequantize(q, scale, None).tolist() == [[2.0, 14.0, -4.0, 0.0]]
    assert dequantize(q, scale, torch.tensor([[1, -8]], dtype=torch.int8)).tolist() == [[0.0, 12.0, 0.0, 4.0]]


@pytest.mark.parametrize("group_size", [0, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantized_linear_equals_dequantized_product(group_size, symmetric):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(5, 12, generator=rng)
    q = torch.randint(-8, 8, (3, 12), generator=rng, dtype=torch.int8)
    groups = 12 // (group_size or 12)
    scale = torch.rand(3, groups, generator=rng) + 0.1
    zero_point = None if symmetric else torch.randint(-8, 8, (3, groups), generator=rng, dtype=torch.int8)
    bias = torch.randn(3, generator=rng)
    y = quantized_linear(x, q, scale, zero_point, bias, 8, symmetric, 1.0)
    q_x, s_x, z_x = quantize_per_token(x, 8, symmetric)
    x_hat = (q_x.double() - z_x.double()) * s_x.double()
    expected = x_hat @ dequantize(q, scale, zero_point).double().T + bias.double()
    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-5)


def make_linear(scheme, online=(), columns=16):
    rng = torch.Generator().manual_seed(2)
    q = torch.randint(-8, 8, (6, columns), generator=rng)
    weight = QTensor.pack(q, torch.rand(6, 1, generator=rng) + 0.1, None, scheme.weights)
    return QuantizedLinear(weight, torch.randn(6, generator=rng), scheme, online), rng


def test_weight_only_linear_keeps_activations_in_float():
    layer, rng = make_linear(Scheme(weights=WeightArgs(num_bits=4)))
    x = torch.randn(2, 16, generator=rng)
    weight = dequantize(layer.weight_integers(), layer.scale, None)
    assert torch.allclose(layer(x), x @ weight.T + layer.bias, atol=1e-5)


def test_online_transform_runs_before_the_quantizer():
    scheme = Scheme(weights=WeightArgs(num_bits=4), activations=ActivationArgs(num_bits=4))
    layer, rng = make_linear(scheme, [Hadamard(16)])
    plain, _ = make_linear(scheme)
    x = torch.randn(2, 16, generator=rng)
    assert torch.allclose(layer(x), plain(layer.transform(x)), atol=1e-6)
    assert not torch.allclose(layer(x), plain(x), atol=1e-2)


def test_fake_quantization_is_the_same_function():
    scheme = Scheme(weights=WeightArgs(num_bits=4), activations=ActivationArgs(num_bits=4, symmetric=False))
    layer, rng = make_linear(scheme, [Hadamard(16)])
    x = torch.randn(7, 16, generator=rng)
    assert torch.allclose(layer(x), layer.fake_quantized(x), atol=1e-4)
