"""dINT4 and POST: their levels by the papers, and what they are worth beside integers."""

import pytest
import torch

from quantize.formats import get_format
from quantize.quantizers import QUANTIZERS
from quantize.scheme.scheme import WeightArgs


def error(W, **settings):
    args = WeightArgs(num_bits=4, group_size=32, **settings)
    rounded = QUANTIZERS["rtn"](mse=True).quantize(W, args, None, torch.float32).dequantize()
    return float((rounded - W).square().mean() / W.square().mean())


@pytest.fixture(scope="module")
def laplace():
    rng = torch.Generator().manual_seed(0)
    return -torch.rand(64, 512, generator=rng).clamp(min=1e-7).log() * torch.randn(64, 512, generator=rng).sign()


def test_half_a_step_lies_beside_zero():
    steps = torch.tensor(get_format("dint4").levels) / 2
    assert steps[steps > 0].tolist() == [0.5, 1, 2, 3, 4, 5, 6]
    assert torch.equal(steps, -steps.flip(0))
    assert get_format("dint4_full").levels == (-14, *get_format("dint4").levels)
    args = WeightArgs(num_bits=4, format="dint4", group_size=4)
    W = torch.tensor([[6.0, 0.74, 0.24, -0.26]])  # of which integers leave one
    found = QUANTIZERS["rtn"]().quantize(W, args, None, torch.float32).dequantize()
    assert found.tolist() == [[6, 0.5, 0, -0.5]]


def test_heavy_tails_lose_less_than_as_integers_only_with_the_code_that_is_left(laplace):
    """The balanced reading has a code less, and no gain beside integers whose scales have either sign."""
    integers = error(laplace)
    assert error(laplace, format="dint4_full") < 0.85 * integers
    assert 0.9 * integers < error(laplace, format="dint4") < 1.1 * integers


def test_post_has_powers_of_the_square_root_of_two(laplace):
    levels = torch.tensor(get_format("post").levels)
    assert len(levels) == 15
    torch.testing.assert_close(levels[levels > 0].square(), 2.0 ** torch.arange(-6, 1))
    assert error(laplace, format="nf4") < error(laplace, format="post")
