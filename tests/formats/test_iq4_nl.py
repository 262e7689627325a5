"""IQ4_NL: the levels of the package gguf, signs, zeros and bytes by hand, and what it gains on Gaussian weights."""

import gguf
import pytest
import torch
from helpers.weights import correlated, gram_of, weights

from quantize.formats import get_format
from quantize.formats.iq4_nl import IQ4_NL
from quantize.quantizers import QUANTIZERS
from quantize.scheme.scheme import WeightArgs

ARGS = WeightArgs(num_bits=4, format="iq4_nl", group_size=4)


def rounded(W, mse=True, **settings):
    return QUANTIZERS["rtn"](mse=mse).quantize(W, ARGS.model_copy(update=settings), None, torch.float32)


def test_levels_are_those_of_the_package():
    assert IQ4_NL.levels == gguf.quants.IQ4_NL.kvalues


def test_bytes_by_hand():
    """Codes 0, 15 | 8, 7, the even column low: -127, 113, 1, -10."""
    values = torch.tensor([[-127, 113, 1, -10]], dtype=torch.int8)
    assert get_format("iq4_nl").pack(values, ARGS).tolist() == [[0xF0, 0x78]]


def test_the_longer_side_gets_the_longer_side_of_the_levels():
    """The same group upside down has the same levels and the other sign."""
    W = torch.tensor([[127.0, -113, -1, 10], [-127.0, 113, 1, -10]]) / 64
    found = rounded(W)
    assert found.unpack().tolist() == [[-127, 113, 1, -10]] * 2
    assert (found.scale.dtype, found.scale.tolist()) == (torch.float16, [[-1 / 64], [1 / 64]])
    assert torch.equal(found.dequantize(), W)


@pytest.mark.parametrize("value", [0.0, -1e-9, 3.0])
def test_equal_weights(value):
    """No level is zero: the least scale stands for it."""
    found = rounded(torch.full((1, 4), value))
    found.check("W")
    assert found.dequantize()[0].tolist() == pytest.approx([value] * 4, abs=1e-5, rel=1e-2)


def test_gaussian_weights_lose_less_than_as_integers_of_either_sign():
    W = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))

    def error(**settings):
        return (rounded(W, **settings).dequantize() - W).square().mean() / W.square().mean()

    assert error(group_size=32) < 0.88 * error(group_size=32, format="int")  # 5.6 and 6.7 in a thousand
    assert error(group_size=128) < 0.85 * error(group_size=128, format="int")


def test_gptq_rounds_to_its_levels():
    args = ARGS.model_copy(update={"group_size": 32})
    found = QUANTIZERS["gptq"]().quantize(weights(), args, gram_of(correlated()), torch.float32)
    assert set(found.unpack().unique().tolist()) <= set(IQ4_NL.levels)
