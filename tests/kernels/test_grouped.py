"""The GEMM kernel for groups, in Triton's interpreter: each group exact, their sum in float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.operands import SCHEMES, activations, rng, weight

from quantize.kernels import grouped
from quantize.kernels.config import Config
from quantize.kernels.prepack import exact_gemm, prepack, unpack_activations, unpack_weight

pytestmark = pytest.mark.usefixtures("poisoned")


def rounding_bound(qa, pw):
    """How far float32 sums over groups may be from the exact result: ε for each operation, of all magnitudes."""
    q, scale, zero = unpack_weight(pw)
    a = unpack_activations(qa)[:, : pw.columns].double().abs() + qa.zero_point.double().abs()[:, None]
    w = (q.double() - (0 if zero is None else zero.double().repeat_interleave(pw.group_size, 1))).abs()
    w = w * scale.double().abs().repeat_interleave(pw.group_size, 1)
    return 2**-24 * (scale.shape[1] + 6) * (a @ w.T) * qa.scale.double()[:, None]


@pytest.mark.parametrize("symmetric_w", [True, False])
@pytest.mark.parametrize("symmetric_a", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("scheme", ["W8A8", "W4A8 shift", "W4A4 shift"])
def test_groups(scheme, group_size, symmetric_a, symmetric_w):
    bits_w, bits_a, _, variant = SCHEMES[scheme]
    M, N, K = 5, 37, 3 * group_size
    pw = weight(N, K, bits_w, 3, symmetric_w)
    qa = activations(M, K, bits_a, "int8", symmetric_a, group_size)
    exact = exact_gemm(replace(qa, scale=qa.scale.double()), replace(pw, scale=pw.scale.double()), None, torch.float64)
    results = []
    for parts in (1, 2):
        config = Config(block_m=16, block_n=32, variant=variant, split_k=parts)
        results.append(grouped.launch(qa, pw, None, torch.float32, config))
        assert ((results[-1].double() - exact).abs() <= rounding_bound(qa, pw)).all()
    if symmetric_a and group_size >= 64:
        assert torch.equal(results[0], exact_gemm(qa, pw, None, torch.float32))
    assert not pw.counters.any()


@pytest.mark.parametrize("scale", ["8 bits", "float", "of either sign"])
def test_group_scales_of_8_bits_are_found_and_exact(scale):
    integers = torch.randint(1, 256, (9, 4), generator=rng(3)).float()
    integers[:, 0] = 253  # a prime, so that it is the channel's scale which comes back
    channel = (torch.rand(9, 1, generator=rng(4)) + 0.5).bfloat16().float()
    given = (integers * channel).nextafter(torch.ones(())) if scale == "float" else integers * channel
    if scale == "of either sign":
        given *= torch.tensor([1, -1, 1, -1])
    q = torch.randint(-8, 8, (9, 512), generator=rng(1), dtype=torch.int8)
    pw = prepack(q, given, None, 4)
    assert pw.group_scale.dtype == (torch.uint8 if scale == "8 bits" else torch.float32)
    assert torch.equal(unpack_weight(pw)[1], given)
    qa = activations(2, 512, group_size=128)
    y = grouped.launch(qa, pw, None, torch.float32, Config(block_n=16))
    exact = exact_gemm(replace(qa, scale=qa.scale.double()), replace(pw, scale=pw.scale.double()), None, torch.float64)
    assert ((y.double() - exact).abs() <= rounding_bound(qa, pw)).all()
