"""The GEMM kernel for experts, in Triton's interpreter: one launch equals the products of each expert."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.operands import SCHEMES, activations, rng, weight

from quantize.kernels import experts, gemm, grouped
from quantize.kernels.config import Config
from quantize.kernels.ops import expert_gemm, expert_linear
from quantize.kernels.packed import PackedWeight, QuantizedActivations
from quantize.kernels.prepack import exact_expert_gemm
from quantize.kernels.reference import quantized_linear

pytestmark = pytest.mark.usefixtures("poisoned")
E, N, M = 4, 37, 41
ENDS = torch.tensor([3, 3, 40, 41], dtype=torch.int32)  # few rows, none, more than two tiles, one


def rows(qa: QuantizedActivations, part: slice) -> QuantizedActivations:
    return QuantizedActivations.of([x[part] for x in qa.tensors()], qa.layout)


def channels(pw: PackedWeight, part: slice) -> PackedWeight:
    by_group = {name: x if x is None else x[:, part].contiguous() for name, x in vars(pw).items() if name in GROUPED}
    return replace(pw, data=pw.data[part], scale=pw.scale[part], high_sum=pw.high_sum[part], **by_group)


GROUPED = ("group_scale", "zero_point", "weight_sum")


@pytest.mark.parametrize("symmetric_w", [True, False])
@pytest.mark.parametrize("symmetric_a", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_scale_a_channel(scheme, symmetric_a, symmetric_w):
    bits_w, bits_a, layout, variant = SCHEMES[scheme]
    pw, qa = weight(E * N, 200, bits_w, 1, symmetric_w), activations(M, 200, bits_a, layout, symmetric_a)
    bias = torch.randn(E * N, generator=rng(9))
    config = Config(block_m=16, block_n=32, variant=variant)
    found = experts.launch(qa, pw, ENDS, bias, torch.float32, config)
    assert torch.equal(found, exact_expert_gemm(qa, pw, ENDS, bias, torch.float32))
    for e, (start, end) in enumerate([(0, 3), (3, 3), (3, 40), (40, 41)]):
        its = slice(e * N, (e + 1) * N)
        alone = gemm.launch(rows(qa, slice(start, end)), channels(pw, its), bias[its], torch.float32, config)
        assert torch.equal(found[start:end], alone)


@pytest.mark.parametrize("symmetric_w", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("scheme", ["W8A8", "W4A8 shift", "W4A4 shift"])
def test_groups(scheme, group_size, symmetric_w):
    """The same bits as the kernel for one weight gives for each expert."""
    bits_w, bits_a, _, variant = SCHEMES[scheme]
    K = 2 * group_size
    pw = weight(E * N, K, bits_w, 2, symmetric_w)
    qa = activations(M, K, bits_a, "int8", symmetric_w, group_size)
    config = Config(block_m=16, block_n=32, variant=variant)
    found = experts.launch(qa, pw, ENDS, None, torch.float32, config)
    for e, (start, end) in enumerate([(0, 3), (3, 3), (3, 40), (40, 41)]):
        part = channels(pw, slice(e * N, (e + 1) * N))
        alone = grouped.launch(rows(qa, slice(start, end)), part, None, torch.float32, config)
        assert torch.equal(found[start:end], alone)


def test_tiles_by_hand():
    """Rows 0-2 of expert 0, none of 1, 3-39 of 2, 40 of 3; tiles of 16; six may be needed, and five are."""
    expert, first = experts.tiles_of(ENDS, M, 16)
    assert expert.tolist() == [0, 2, 2, 2, 3, 3]
    assert first.tolist() == [0, 3, 19, 35, 40, 41]


def test_no_rows_at_all():
    pw, ends = weight(E * N, 128), torch.zeros(E, dtype=torch.int32)
    for y in (
        experts.launch(activations(0, 128), pw, ends, None, torch.float32, Config()),
        expert_gemm(activations(0, 128), pw, ends),
    ):
        assert y.shape == (0, N)


def test_operands_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="148 channels are not those of 3 experts alike"):
        experts.launch(activations(M, 128), weight(E * N, 128), ENDS[:3], None, torch.float32, Config())
    with pytest.raises(ValueError, match="no kernel for experts in groups of 64 columns as mask"):
        experts.launch(
            activations(M, 128), weight(E * N, 128, groups=2), ENDS, None, torch.float32, Config(variant="mask")
        )


@pytest.mark.parametrize("triton", [False, True], ids=["reference", "triton"])
@pytest.mark.parametrize("bits", [4, 8])
def test_linears_of_experts(bits, triton, request):
    """From floating point to the product, as each expert's quantized linear computes it."""
    if triton:
        request.getfixturevalue("on_triton")
    x = torch.randn(M, 128, generator=rng(1))
    q = torch.randint(-8, 8, (E * N, 128), generator=rng(2), dtype=torch.int8)
    scale, bias = torch.rand(E * N, 1, generator=rng(3)) + 0.1, torch.randn(E * N, generator=rng(4))
    found = expert_linear(x, experts_weight(q, scale), ENDS, bias, bits, False, 1.0)
    for e, (start, end) in enumerate([(0, 3), (3, 3), (3, 40), (40, 41)]):
        its = slice(e * N, (e + 1) * N)
        alone = quantized_linear(x[start:end], q[its], scale[its], None, bias[its], bits, False, 1.0)
        assert torch.allclose(found[start:end], alone, rtol=1e-6, atol=1e-5)


def experts_weight(q, scale):
    from quantize.kernels.prepack import prepack

    return prepack(q, scale, None, 4)
