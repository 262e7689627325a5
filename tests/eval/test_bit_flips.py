"""Bits turn as often as asked for and are turned back; clipping saves floats, and codes need none."""

import json
import math

import pytest
import torch

from quantize.errors import UsageError
from quantize.eval.bit_flips import (
    CLIPS,
    clipped,
    flip_bits,
    flip_campaign,
    flipped,
    linears,
    narrowest,
    profile,
    zeroed,
)
from quantize.eval.loading import load_any
from quantize.eval.perplexity import score_language


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int8])
def test_bits_turn_at_the_rate(dtype):
    x = torch.arange(1 << 14).to(dtype).view(64, -1)
    turned = flip_bits(x, 0.01, generator())
    assert (turned.shape, turned.dtype) == (x.shape, dtype)
    octets = turned.view(torch.uint8) ^ x.view(torch.uint8)
    count = sum(int((octets >> bit & 1).sum()) for bit in range(8))
    assert count == pytest.approx(0.01 * 8 * octets.numel(), rel=0.1)
    assert torch.equal(flip_bits(x, 0.01, generator()).view(torch.uint8), turned.view(torch.uint8))
    assert torch.equal(flip_bits(x, 0.0, generator()), x)


def test_the_narrowest_type_holds_a_weight_exactly():
    assert narrowest(torch.tensor([1.0, 2.0**100])).dtype == torch.bfloat16
    assert narrowest(torch.tensor([1.0, 1 + 2.0**-10])).dtype == torch.float16
    assert narrowest(torch.tensor([2.0**100, 1 + 2.0**-10])).dtype == torch.float32


def test_what_is_beyond_the_bound_or_no_number_is_zero():
    x = torch.tensor([2.0, -2.0, 2.1, -3.0, math.inf, math.nan])
    assert zeroed(x, 2.0).tolist() == [2, -2, 0, 0, 0, 0]
    assert zeroed(torch.full((2, 2), 2.0), torch.tensor([1.0, 2.0])).tolist() == [[0, 2], [0, 2]]


def test_models_are_left_as_they_were_and_bounds_hold_what_was_profiled(artifact_rtn, one_layer):
    ids = [torch.arange(3, 67)[None]]
    for model in (artifact_rtn.load(), load_any(one_layer)):
        paths, loss = linears(model), score_language(model, ids).loss
        assert len(paths) == 7
        bounds = profile(model, paths, ids)
        for clip in CLIPS[1:]:
            with clipped(model, bounds, clip):
                assert score_language(model, ids).loss == loss
            with clipped(model, {path: (T / 2, t / 2) for path, (T, t) in bounds.items()}, clip):
                assert score_language(model, ids).loss != loss
        with flipped(model, paths, True, 0.01, generator()):
            assert score_language(model, ids).loss != loss
        assert score_language(model, ids).loss == loss


@pytest.mark.slow
def test_zeros_save_a_float_model_and_codes_need_none(artifact_rtn, one_layer, stories_dev, cli):
    arguments = ("--text", stories_dev, "--nsamples", 4, "--seqlen", 64, "--bit-flips", "0,1e-4", "--json")
    shown = cli("eval", artifact_rtn.directory, "--against", one_layer, *arguments)
    rows = json.loads(shown.out)
    loss = {(row["model"], row["clip"], row["rate"]): row["worst"] for row in rows}
    assert len(loss) == 3 * len(CLIPS) * 2
    assert loss["float", "none", 1e-4] == pytest.approx(math.log(512))
    assert loss["float", "zero", 1e-4] < loss["float", "none", 0] + 0.3
    assert loss["codes", "none", 1e-4] < loss["codes", "none", 0] + 0.05
    assert loss["codes and scales", "none", 1e-4] >= loss["codes", "none", 1e-4]
    table = cli("eval", one_layer, *arguments[:-1]).out
    assert "1e-04" in table.replace("0.0001", "1e-04")


def test_what_bit_flips_are_not_for(minilm, sts):
    with pytest.raises(UsageError, match="is no language model, and --bit-flips is for these"):
        flip_campaign(minilm, sts[0], [0.0])
