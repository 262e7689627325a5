"""Q4_1: 16 levels from the least to the largest weight, of which none need be zero."""

import pytest
import torch

from quantize.errors import UsageError
from quantize.formats.check import check_scheme
from quantize.quantizers.grid import on_grid
from quantize.quantizers.rtn import RoundToNearest
from quantize.recipe.recipe import load_recipe
from quantize.scheme.scheme import ActivationArgs, Scheme, WeightArgs

ARGS = WeightArgs(num_bits=4, format="q4_1", symmetric=False, group_size=4)


def test_the_levels_span_the_range():
    W = torch.tensor([[1.0, 8.5, 4.0, 2.0]])
    found = RoundToNearest().quantize(W, ARGS, None, torch.bfloat16)
    assert found.unpack().tolist() == [[-8, 7, -2, -6]]
    assert (found.scale.item(), found.zero_point.item()) == (0.5, -10.0)
    assert torch.equal(found.dequantize(), W)


def test_equal_weights():
    W = torch.tensor([[3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0], [-2.0, -2.0, -2.0, -2.0]])
    assert torch.equal(RoundToNearest(mse=True).quantize(W, ARGS, None, torch.float32).dequantize(), W)


def test_activations_stay_in_floating_point():
    assert load_recipe("W4A16", {"weights": {"format": "q4_1"}}).weights.group_size == 32
    with pytest.raises(ValueError, match=r"q4_1 weights and int activations have no product; leave activations in flo"):
        check_scheme(Scheme(weights=ARGS, activations=ActivationArgs(num_bits=8)))
    with pytest.raises(UsageError, match="q4_1 weights need num_bits = 4 and symmetric = false"):
        load_recipe("W4A16", {"weights": {"format": "q4_1", "symmetric": True}})


def test_gguf_holds_its_codes_and_scales():
    gguf = pytest.importorskip("gguf")
    from quantize.export.gguf.blocks import blocks

    generator = torch.Generator().manual_seed(0)
    raw = gguf.quants.quantize(torch.randn(8, 64, generator=generator).numpy(), gguf.GGMLQuantizationType.Q4_1)
    W = torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q4_1))
    found = on_grid(W, ARGS.model_copy(update={"group_size": 32}), torch.float32)
    made, given = blocks(found).data.view(8, 2, 20), torch.from_numpy(raw).view(8, 2, 20)
    minima = [x[..., 2:4].contiguous().view(torch.int16).int() for x in (made, given)]
    assert torch.equal(made[..., 4:], given[..., 4:])
    assert torch.equal(made[..., :2], given[..., :2])
    assert int((minima[0] - minima[1]).abs().max()) <= 1  # units in the last place of float16
