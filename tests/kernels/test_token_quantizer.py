"""The fused quantizer in Triton's interpreter, against the reference: all codes, scales, zero points and sums equal."""

import pytest
import torch
from helpers.opcheck import CHECKS
from scipy.linalg import hadamard
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from quantize.kernels import token_quantizer
from quantize.kernels.custom_ops import quantize_tokens
from quantize.kernels.hadamard import hadamard_transform
from quantize.kernels.ops import quantize_activations
from quantize.kernels.packed import pack_activations, pad_columns, unpack_pairs
from quantize.kernels.prologue import Prologue
from quantize.kernels.reference import quantize_per_token

pytestmark = pytest.mark.usefixtures("poisoned")

SCHEMES = {  # bits, symmetric, clip ratio, layout
    "int8": (8, True, 1.0, "int8"),
    "int8 with zero points": (8, False, 1.0, "int8"),
    "6 bits": (6, False, 0.93, "int8"),
    "4 bits": (4, False, 0.9, "int8"),
    "pairs": (4, True, 1.0, "pair"),
    "pairs that reach -8": (4, True, 0.6, "pair"),
    "pairs with zero points": (4, False, 0.9, "pair"),
}
PLAIN = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed))


def wanted(x, scheme, group_size=0):
    """What the kernel must equal, from activations as they reach the quantizer."""
    bits, symmetric, clip_ratio, layout = scheme
    q, scale, zero_point = quantize_per_token(x.float(), bits, symmetric, clip_ratio)
    return pack_activations(q, scale[:, 0], zero_point[:, 0], layout, group_size)


def assert_equal(found, expected):
    for name in ("q", "scale", "zero_point", "sum", "low_sum"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0, msg=name)
    assert found.layout == expected.layout


@DTYPES
@PLAIN
def test_equals_the_reference(scheme, dtype):
    for shape, group_size in [((1, 64), 0), ((3, 200), 8), ((2, 5000), 0)]:
        x = (normal(*shape) + 0.3).to(dtype)
        assert_equal(token_quantizer.launch(x, *scheme, group_size), wanted(x, scheme, group_size))


EXTREMES = [
    [0.0, 0.0, 0.0, 0.0],
    [1e38, -1e38, 3.0, 0.0],
    [1e-40, -1e-41, 0.0, 0.0],  # below the smallest scale
    [1e-36, -7e-37, 3e-37, 0.0],
    [-5.0, -5.0, -5.0, -5.0],
    [3e4, 1e-4, -1e-4, 0.5],
    [7.0, 0.5, 1.5, -2.5],  # halves
    [127.0, -0.5, 126.5, -127.0],
]


@PLAIN
def test_extremes(scheme):
    x = torch.tensor(EXTREMES)
    found = token_quantizer.launch(x, *scheme)
    assert_equal(found, wanted(x, scheme))
    assert (found.scale > 0).all()


def test_codes_reach_both_ends():
    x = torch.tensor([[-14.0, 14.0, 3.5]])
    found = token_quantizer.launch(x, 4, True, 0.5, "pair")
    assert unpack_pairs(found.q)[0, :4].tolist() == [-8, 7, 4, 0]
    assert token_quantizer.launch(x * 1e6, 8, True, 1e-6).q[0, :3].tolist() == [-128, 127, 127]


@pytest.mark.parametrize("bits", [4, 6])
def test_zero_points_folded_in(bits):
    x = normal(3, 200) + torch.tensor([[5.0], [-5.0], [0.0]])
    q, scale, zero_point = quantize_per_token(x, bits, symmetric=False)
    found = token_quantizer.launch(x, bits, False, 1.0, fold=True)
    assert_equal(found, pack_activations(q - zero_point, scale[:, 0], torch.zeros(3), "int8"))


def test_rows_may_lie_apart():
    x = normal(5, 300)[:, :200]
    assert_equal(token_quantizer.launch(x, *SCHEMES["4 bits"]), wanted(x, SCHEMES["4 bits"]))


def test_no_tokens():
    assert token_quantizer.launch(torch.empty(0, 100), *SCHEMES["int8"]).q.shape == (0, 128)


def test_the_last_sum_may_have_fewer_columns():
    found = token_quantizer.launch(normal(3, 200), *SCHEMES["4 bits"], group_size=64)
    columns = pad_columns(found.q).unflatten(-1, (-1, 64)).sum(-1, dtype=torch.int32)
    assert torch.equal(found.sum, columns)


# --- what is in front of it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "columns", "order"), [(1, 384, 128), (17, 384, 128), (3, 256, 128), (20, 96, 32)])
def test_hadamard_is_exact_where_its_sums_are(rows, columns, order, dtype):
    x = torch.randint(-30, 31, (rows, columns), generator=rng(), dtype=torch.int8).to(dtype)
    H = torch.from_numpy(hadamard(order)).float()
    rotated = (x.float().unflatten(-1, (-1, order)) @ H * order**-0.5).flatten(-2)
    found = token_quantizer.launch(x, *SCHEMES["pairs with zero points"], prologue=Prologue(hadamard=order))
    assert_equal(found, wanted(rotated, SCHEMES["pairs with zero points"]))


def test_hadamard_is_the_transform_of_the_model():
    x = normal(16, 512)
    found = token_quantizer.launch(x, *SCHEMES["int8"], prologue=Prologue(hadamard=128))
    expected = wanted(hadamard_transform(x.double(), 128), SCHEMES["int8"])
    torch.testing.assert_close(found.scale, expected.scale, rtol=1e-6, atol=0)
    wrong = (found.q.int() - expected.q.int()).abs()
    assert wrong.max() <= 1
    assert wrong.float().mean() < 1e-3  # at ties


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter cuts bfloat16 off
def test_norm_is_that_of_transformers(dtype):
    """Squares whose sum is exact, so that every summation has the same."""
    norm = LlamaRMSNorm(384, eps=1e-5).to(dtype)
    norm.weight.data = (normal(384, seed=1) + 1).to(dtype)
    x = torch.randint(-9, 10, (5, 384), generator=rng(), dtype=torch.int8).to(dtype)
    prologue = Prologue(gain=norm.weight.data, epsilon=1e-5)
    found = token_quantizer.launch(x, *SCHEMES["4 bits"], prologue=prologue)
    assert_equal(found, wanted(norm(x), SCHEMES["4 bits"]))


def test_norm_then_hadamard():
    norm = LlamaRMSNorm(256, eps=1e-5)
    x = normal(3, 256) * 40
    found = token_quantizer.launch(x, *SCHEMES["int8"], prologue=Prologue(norm.weight.data, 1e-5, 64))
    expected = wanted(hadamard_transform(norm(x).double(), 64), SCHEMES["int8"])
    torch.testing.assert_close(found.scale, expected.scale, rtol=1e-6, atol=0)
    assert (found.q.int() - expected.q.int()).abs().max() <= 1


@DTYPES
def test_sorted_and_divided(dtype):
    x, order = normal(3, 200).to(dtype), torch.randperm(200, generator=rng(1))
    smooth = torch.rand(200, generator=rng(2)) + 0.1
    prologue = Prologue(order=order, smooth=smooth)
    found = token_quantizer.launch(x, *SCHEMES["4 bits"], prologue=prologue)
    assert_equal(found, wanted(x[:, order].float() / smooth, SCHEMES["4 bits"]))


@pytest.mark.usefixtures("on_triton")
def test_operator_with_all_in_front():
    """As the model has it, for the GPU and for the reference."""
    x, gain = normal(4, 256), normal(256, seed=1)
    found = quantize_activations(x, 4, False, 0.9, "pair", 64, Prologue(gain, 1e-5, 32))
    assert torch.equal(found.q, token_quantizer.launch(x, 4, False, 0.9, "pair", 64, Prologue(gain, 1e-5, 32)).q)
    assert found.sum.shape == (4, 4)


def test_operator_on_a_cpu():
    x, gain = normal(4, 256), normal(256, seed=1)
    norm = LlamaRMSNorm(256, eps=1e-5)
    norm.weight.data = gain
    found = quantize_activations(x, 4, False, 0.9, "pair", 64, Prologue(gain, 1e-5, 32))
    assert_equal(found, wanted(hadamard_transform(norm(x), 32), SCHEMES["pairs with zero points"], 64))
    arguments = (x, 4, False, 0.9, "pair", 64, gain, 1e-5, 32)
    torch.library.opcheck(quantize_tokens, arguments, test_utils=CHECKS)
