"""Weights on a grid are recognised by their values alone, and their integers are kept."""

from __future__ import annotations

import pytest
import torch
from helpers.weights import rounded_to_levels, rounded_to_q4_0, rounded_to_q4_1

from quantize.formats import get_format
from quantize.quantizers.grid import on_grid
from quantize.quantizers.rtn import RoundToNearest
from quantize.scheme.scheme import WeightArgs

ASYMMETRIC = WeightArgs(num_bits=4, symmetric=False, group_size=32)


def random(rows=48, columns=128):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_q4_0_in_any_dtype(dtype):
    """The step of Q4_0 has either sign, so that its levels are -8 … 7 or -7 … 8 of a positive step."""
    W = rounded_to_q4_0(random()).to(dtype).float()
    found = on_grid(W, ASYMMETRIC, dtype)
    assert found.scale.dtype == dtype
    torch.testing.assert_close(found.dequantize(), W, rtol=1.01 * torch.finfo(dtype).eps, atol=0)
    assert dtype != torch.float32 or torch.equal(found.dequantize(), W)
    assert sorted(found.zero_point.unique().tolist()) == [-1, 0]


def test_scales_for_float16():
    """Those of Q4_0 are float16 already, and so are they times -1, its only zero point besides 0."""
    W, args = rounded_to_q4_0(random()), ASYMMETRIC.model_copy(update={"scale_dtype": "float16"})
    found = on_grid(W, args, torch.float32)
    assert torch.equal(found.dequantize(), W)
    found = on_grid(rounded_to_levels(random(), 15) + 0.0, args.model_copy(update={"group_size": 0}), torch.float32)
    products = found.scale * found.zero_point
    assert torch.equal(products.half().float(), products)


def test_what_lies_on_no_grid():
    W, V = random(), rounded_to_q4_0(random())
    assert on_grid(W, ASYMMETRIC, torch.float32) is None
    assert on_grid(W.bfloat16().float(), ASYMMETRIC, torch.bfloat16) is None
    assert on_grid(V, ASYMMETRIC.model_copy(update={"group_size": 64}), torch.float32) is None  # two steps in a group
    V[7, 5] += 0.3 * V[7, :32].abs().max() / 8  # one weight of all
    assert on_grid(V, ASYMMETRIC, torch.float32) is None
    assert on_grid(torch.zeros(4, 32), ASYMMETRIC, torch.float32) is None


@pytest.mark.parametrize("levels", [2, 3, 7, 15])
@pytest.mark.parametrize("symmetric", [False, True])
def test_few_levels_in_each_row(levels, symmetric):
    W = rounded_to_levels(random(), levels)
    found = on_grid(W, WeightArgs(num_bits=4, symmetric=symmetric), torch.float32)
    torch.testing.assert_close(found.dequantize(), W, rtol=1e-6, atol=0)
    assert (found.zero_point is None) == symmetric


def test_levels_that_a_format_without_zero_points_does_not_hold():
    W = rounded_to_q4_0(random())
    symmetric = ASYMMETRIC.model_copy(update={"symmetric": True})
    assert torch.equal(on_grid(W, symmetric, torch.float32).dequantize(), W)
    W[0, :32] = torch.arange(32) % 16 * 0.5  # from 0 to 15 steps
    assert on_grid(W, symmetric, torch.float32) is None
    assert torch.equal(on_grid(W, ASYMMETRIC, torch.float32).dequantize(), W)


def test_a_group_of_zeros_beside_others():
    W = rounded_to_q4_0(random())
    W[3, 32:64] = 0
    assert torch.equal(on_grid(W, ASYMMETRIC, torch.float32).dequantize(), W)


@pytest.mark.parametrize(("name", "size"), [("mxfp4", 32), ("nvfp4", 16), ("nf4", 64)])
@pytest.mark.parametrize("mse", [False, True])
def test_values_of_other_formats(name, size, mse):
    args = WeightArgs(num_bits=4, format=name, group_size=size)
    quantized = RoundToNearest(mse=mse).quantize(random(), args, None, torch.float32)
    found = on_grid(quantized.dequantize(), args, torch.float32)
    assert torch.equal(found.data, quantized.data)
    torch.testing.assert_close(found.dequantize(), quantized.dequantize(), rtol=1e-6, atol=0)
    assert on_grid(random(), args, torch.float32) is None
    assert get_format(name).element != "int"


@pytest.mark.parametrize("share", [1.0, 0.37, 0.004])
def test_a_scale_for_the_whole_that_is_shared_with_others_or_of_which_a_part_is_seen(share):
    args = WeightArgs(num_bits=4, format="nvfp4", group_size=16)
    whole, part = random(), random().flip(0) * share
    both = RoundToNearest(mse=True).quantize_weights([whole, part], args, None, torch.float32)
    assert torch.equal(both[0].global_scale, both[1].global_scale)
    weights = [x.dequantize() for x in both]
    for W in weights:
        for rows, sharing in ((W, weights), (W, ()), (W[::5], ())):
            found = on_grid(rows.contiguous(), args, torch.float32, sharing)
            torch.testing.assert_close(found.dequantize(), rows, rtol=1e-6, atol=0)
    scales = {float(on_grid(W, args, torch.float32, weights).global_scale) for W in weights}
    assert len(scales) == 1
    assert on_grid(part, args, torch.float32, [part, whole]) is None


Q4_1 = WeightArgs(num_bits=4, format="q4_1", symmetric=False, group_size=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_levels_without_zero(dtype):
    W = rounded_to_q4_1(random() + 0.1).to(dtype).float()
    found = on_grid(W, Q4_1, dtype)
    error = (found.dequantize() - W).abs().view(-1, 32).amax(-1)
    assert (error <= max(torch.finfo(dtype).eps, 2**-11) * W.abs().view(-1, 32).amax(-1)).all()
    assert (found.scale.dtype, found.zero_point.dtype) == (torch.float16, torch.float16)
    assert on_grid(W, ASYMMETRIC, dtype) is None
    found.check("w")


def test_what_lies_on_no_levels():
    W, V = random(), rounded_to_q4_1(random())
    assert on_grid(W.bfloat16().float(), Q4_1, torch.bfloat16) is None
    assert on_grid(V, Q4_1.model_copy(update={"group_size": 64}), torch.float32) is None
    V[7, 5] += 0.3 * V[7, :32].abs().max() / 8
    assert on_grid(V, Q4_1, torch.float32) is None


def test_groups_of_one_weight():
    W = rounded_to_q4_1(random())
    W[2, :32], W[3, :32] = -0.25, 0
    assert torch.equal(on_grid(W, Q4_1, torch.float32).dequantize()[2:4, :32], W[2:4, :32])


@pytest.mark.parametrize("symmetric", [False, True])
def test_eight_bits_in_each_row(symmetric):
    args = WeightArgs(num_bits=8, symmetric=symmetric)
    W = RoundToNearest().quantize(random() + 0.1 * (not symmetric), args, None, torch.float16).dequantize()
    found = on_grid(W, args, torch.float16)
    assert torch.equal(found.dequantize(), W)
    assert on_grid(random(), args, torch.float32) is None
    assert on_grid(W.bfloat16().float(), args, torch.bfloat16) is None


def test_a_scale_is_negative_where_only_that_fits():
    """Q4_0 of llama.cpp has scales of either sign."""
    q = torch.randint(-8, 8, (6, 32), generator=torch.Generator().manual_seed(0))
    q[:, :2] = torch.tensor([-8, 7])
    W = q * torch.tensor([0.5, -0.5, 1.0, -1.0, 2.0, -2.0])[:, None]
    found = on_grid(W, WeightArgs(num_bits=4, group_size=32), torch.bfloat16)
    assert torch.equal(found.dequantize(), W)
    assert found.scale[:, 0].tolist() == [0.5, -0.5, 1.0, -1.0, 2.0, -2.0]
    found.check("W")
    assert (on_grid(W, WeightArgs(num_bits=4, group_size=32, symmetric=False), torch.bfloat16).scale > 0).all()
