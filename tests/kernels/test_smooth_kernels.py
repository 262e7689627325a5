"""Runtime smooth in Triton's interpreter: maxima, and the product with one scalar for each K tile."""

import pytest
import torch
from helpers.opcheck import CHECKS

from quantize.kernels import smooth_maxima
from quantize.kernels.hadamard import hadamard_transform
from quantize.kernels.runtime_smooth import channel_maxima, runtime_smooth_linear
from quantize.kernels.smooth_linear import smooth_linear, smooth_prepack, tile_columns

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def outliers(rows, columns, dtype=torch.float32):
    """Channels of very different sizes, and a row of zeros where there is more than one."""
    x = torch.randn(rows, columns, generator=rng()) * torch.logspace(-1, 1, columns)
    x[1:2] = 0
    return x[:, torch.randperm(columns, generator=rng(1))].to(dtype)


@DTYPES
@pytest.mark.parametrize(("rows", "columns"), [(1, 100), (37, 300)])
def test_maxima(rows, columns, dtype):
    x = outliers(rows, columns, dtype)
    same, maxima = smooth_maxima.launch(x, normalize_tokens=False)
    assert same is x
    assert torch.equal(maxima, channel_maxima(x.float(), False))
    _, maxima = smooth_maxima.launch(x, normalize_tokens=True)
    torch.testing.assert_close(maxima, channel_maxima(x.float(), True), rtol=1e-6, atol=0)


@DTYPES
@pytest.mark.parametrize("rows", [1, 19])
def test_maxima_behind_a_hadamard_transform(rows, dtype):
    x = outliers(rows, 256, dtype)
    rotated, maxima = smooth_maxima.launch(x, normalize_tokens=False, order=64)
    assert rotated.dtype == dtype
    step = {torch.float32: 1e-5, torch.float16: 2e-2}[dtype]  # half a last place of magnitudes below 32
    torch.testing.assert_close(rotated.double(), hadamard_transform(x.double(), 64), rtol=0, atol=step)
    assert torch.equal(maxima, channel_maxima(rotated.float(), False))


def test_no_tokens():
    _, maxima = smooth_maxima.launch(torch.empty(0, 100), True)
    assert maxima.tolist() == [1.0] * 100


def problem(bits, symmetric_w, M, N, K, dtype):
    low, high = -(1 << bits - 1), 1 << bits - 1
    q = torch.randint(low, high, (N, K), generator=rng(2), dtype=torch.int8)
    zero = None if symmetric_w else torch.randint(low, high, (N, 1), generator=rng(3), dtype=torch.int8)
    return outliers(M, K, dtype), q, torch.rand(N, 1, generator=rng(4)) + 0.1, zero


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("symmetric_w", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits_w", "bits_x"), [(4, 4), (4, 8), (8, 8)])
def test_equals_the_reference(bits_w, bits_x, symmetric, symmetric_w):
    for M, N, K, group_size, dtype in [(1, 40, 200, 128, torch.float16), (18, 130, 160, 64, torch.float32)]:
        x, q, scale, zero = problem(bits_w, symmetric_w, M, N, K, dtype)
        bias = torch.randn(N, generator=rng(5)) if symmetric else None
        weight = (*smooth_prepack(q, scale, zero, bits_w), bias, bits_w)
        y = smooth_linear(x, *weight, bits_x, symmetric, 0.9, group_size, False, 0)
        expected = runtime_smooth_linear(x, q, scale, zero, bias, bits_x, symmetric, 0.9, group_size, False)
        assert y.dtype == dtype
        assert torch.equal(y, expected)


@pytest.mark.usefixtures("on_triton")
def test_groups_of_several_tiles():
    """A group's sum is scaled in parts."""
    x, q, scale, zero = problem(4, False, 3, 64, 640, torch.float32)
    y = smooth_linear(x, *smooth_prepack(q, scale, zero, 4), None, 4, 4, False, 0.9, 256, False, 0)
    expected = runtime_smooth_linear(x, q, scale, zero, None, 4, False, 0.9, 256, False)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("bits", [4, 8])
def test_the_linear_is_a_proper_operator(bits):
    x, q, scale, zero = problem(bits, False, 3, 20, 256, torch.float32)
    arguments = (x, *smooth_prepack(q, scale, zero, bits), torch.ones(20), bits, 8, False, 0.9, 32, True, 64)
    torch.library.opcheck(smooth_linear, arguments, test_utils=CHECKS)
    rotated = hadamard_transform(x, 64)
    expected = runtime_smooth_linear(rotated, q, scale, zero, torch.ones(20), 8, False, 0.9, 32, True)
    assert torch.equal(smooth_linear(*arguments), expected)


@pytest.mark.usefixtures("on_triton")
def test_rotated_runtime_smooth():
    """With tokens of one root mean square; where a code falls on a tie it may be its neighbour."""
    x, q, scale, zero = problem(4, True, 5, 40, 256, torch.float32)
    y = smooth_linear(x, *smooth_prepack(q, scale, zero, 4), None, 4, 8, False, 1.0, 128, True, 128)
    expected = runtime_smooth_linear(hadamard_transform(x, 128), q, scale, zero, None, 8, False, 1.0, 128, True)
    torch.testing.assert_close(y, expected, rtol=0, atol=3e-3 * expected.abs().max().item())


def test_half_precision_is_smoothed_in_float32():
    x, *weight = problem(4, False, 9, 24, 256, torch.float16)
    settings = (None, 8, False, 1.0, 64, True)
    expected = runtime_smooth_linear(x.float(), *weight, *settings).half()
    assert torch.equal(runtime_smooth_linear(x, *weight, *settings), expected)


def test_which_groups_have_a_kernel():
    assert [tile_columns(size) for size in (1, 16, 32, 96, 100, 128, 384, 512)] == [0, 0, 32, 32, 0, 128, 128, 128]
