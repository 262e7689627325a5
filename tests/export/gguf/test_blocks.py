"""Blocks of GGUF hold the integers and scales of weights as they are, as the package gguf reads them."""

from __future__ import annotations

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from quantize.errors import QuantizeError
from quantize.export.gguf.blocks import blocks, type_of
from quantize.formats.integer import FLOAT16_BITS, float16_scale
from quantize.formats.qtensor import QTensor
from quantize.quantizers.rtn import RoundToNearest
from quantize.scheme.scheme import WeightArgs


def integers(bits, group_size, symmetric=True, scale_dtype="float16"):
    return WeightArgs(num_bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)


CASES = {
    "Q4_0": [integers(4, 32), integers(4, 64), integers(4, 0)],
    "Q4_1": [integers(4, 32, symmetric=False), integers(4, 64, symmetric=False)],
    "Q8_0": [integers(8, 32), integers(8, 0), integers(6, 0)],
    "MXFP4": [WeightArgs(num_bits=4, format="mxfp4", group_size=32)],
    "NVFP4": [WeightArgs(num_bits=4, format="nvfp4", group_size=16)],
    "IQ4_NL": [WeightArgs(num_bits=4, format="iq4_nl", group_size=size) for size in (32, 64)],
}


def weight(args, scale=1.0, dtype=torch.float32):
    W = torch.randn(5, 192, generator=torch.Generator().manual_seed(0)) * scale
    W[1] *= 100
    W[2] += 0.4
    return RoundToNearest(mse=True).quantize(W, args, None, dtype)


def values(held):
    found = torch.from_numpy(gguf.dequantize(held.data.numpy(), held.type))
    return found if held.scale is None else found * held.scale


@pytest.mark.parametrize(("name", "args"), [(name, args) for name, cases in CASES.items() for args in cases])
def test_the_package_reads_the_values_of_the_weight(name, args):
    own = weight(args)
    held = blocks(own)
    assert (held.type, type_of(args)) == (Type[name], Type[name])
    block, size = gguf.GGML_QUANT_SIZES[held.type]
    assert held.data.shape == (5, 192 // block * size)
    torch.testing.assert_close(values(held), own.dequantize(), rtol=2**-23, atol=0)


def test_the_smallest_integer_is_kept():
    args = integers(4, 32)
    q = torch.tensor([[-8, 7, -1, 0] * 8])
    own = QTensor.pack(q, torch.tensor([[0.25]]), None, args)
    assert torch.equal(values(blocks(own)), q * 0.25)


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_that_are_no_float16_move_weights_a_little(symmetric):
    own = weight(integers(4, 32, symmetric, scale_dtype=None))
    steps = (values(blocks(own)) - own.dequantize()).abs().amax() / own.scale.abs().max()
    assert 0 < steps < 2**-7


def test_scales_beyond_float16_are_refused():
    own = weight(integers(4, 32, scale_dtype=None), scale=1e7)
    with pytest.raises(QuantizeError, match="a scale is too large for float16"):
        blocks(own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-7, 1e-5, 1e-3, 1.0])
def test_scales_and_their_products_with_zero_points_are_float16(dtype, scale):
    for symmetric in (True, False):
        own = weight(integers(4, 32, symmetric), scale, dtype)
        zeros = torch.zeros(1) if own.zero_point is None else own.zero_point.float()
        for found in (own.scale.float(), own.scale.float() * (zeros + 8)):
            assert torch.equal(found.half().float(), found)
    assert weight(integers(4, 32, scale_dtype=None), scale).scale.half().float().ne(own.scale.float()).any()


def test_scales_are_rounded_to_the_nearest():
    scale = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 1e-3
    assert torch.equal(float16_scale(scale, FLOAT16_BITS), scale.half().float())
    assert ((float16_scale(scale, 7) / scale - 1).abs() <= 2**-7).all()
    assert float16_scale(torch.tensor([1e-30]), FLOAT16_BITS) > 0


def test_weights_without_a_type():
    assert type_of(integers(8, 0, symmetric=False)) is None
    assert type_of(WeightArgs(num_bits=4, format="nf4", group_size=64)) is None
