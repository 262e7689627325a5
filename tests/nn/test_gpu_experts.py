"""Quantized experts on the GPU kernel, in Triton's interpreter, against each expert's quantized linear."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.operands import rng

from quantize import load
from quantize.kernels import custom_ops, engine
from quantize.nn.quantized_experts import QuantizedExperts
from quantize.quantizers.rtn import RoundToNearest
from quantize.scheme.scheme import ActivationArgs, RuntimeSmoothArgs, Scheme, WeightArgs
from quantize.transforms.online import Hadamard, hadamard

pytestmark = pytest.mark.usefixtures("poisoned")
E, N, K = 3, 16, 128
OFFS = torch.tensor([2, 2, 5], dtype=torch.int32)  # expert 1 has no rows; the last of 6 rows belongs to none


@pytest.fixture
def kernel(monkeypatch):
    """Turn the kernels on; gives the rows of each launch of that of experts. A function."""
    made = []

    def turn_on():
        def counted(qa, *args, multiply=custom_ops.triton_expert_gemm):
            made.append(len(qa.q))
            return multiply(qa, *args)

        monkeypatch.setattr(engine, "runs_on_triton", lambda x: True)
        monkeypatch.setattr(custom_ops, "triton_expert_gemm", counted)
        return made

    return turn_on


def stack(weights, activations, online=(), transposed=False):
    W, bias = torch.randn(E * N, K, generator=rng()), torch.randn(E * N, generator=rng(1))
    weight = RoundToNearest().quantize(W, weights, None, torch.float32)
    return QuantizedExperts(weight, bias, Scheme(weights=weights, activations=activations), online, E, transposed)


def rows(*shape, dtype=torch.float32):
    return torch.randn(*shape, K, generator=rng(2)).to(dtype)


@pytest.mark.parametrize(
    ("bits", "activation_bits", "symmetric", "dtype"),
    [
        pytest.param(8, 8, True, torch.float32, marks=pytest.mark.slow),
        (4, 8, False, torch.float32),
        pytest.param(4, 4, True, torch.float16, marks=pytest.mark.slow),
    ],
)
def test_one_launch_equals_the_linears_bit_by_bit(bits, activation_bits, symmetric, dtype, kernel):
    args = WeightArgs(num_bits=bits, symmetric=symmetric), ActivationArgs(num_bits=activation_bits, symmetric=symmetric)
    experts, x, together = stack(*args).to(dtype), rows(6, dtype=dtype), rows(E, 2, dtype=dtype)
    numbers = torch.tensor([2, 0, 2])
    calls = (
        lambda: experts(x, OFFS),
        lambda: experts(together),
        lambda: experts.expert_product(-1, together),
        lambda: experts.by_row(together, numbers),
        lambda: torch.nn.functional.linear(x, experts[1]),
    )
    expected = [call() for call in calls]
    made = kernel()
    found = [call() for call in calls]
    for y, wanted in zip(found, expected, strict=True):
        assert y.dtype == dtype
        assert torch.equal(y, wanted)
    assert made == [6, 6, 6, 6, 6]
    assert not found[0][5:].any()
    assert experts(x[:0], torch.zeros(E, dtype=torch.int32)).shape == (0, N)


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("online", [(), (hadamard(K),), (Hadamard(K),)], ids=["plain", "hadamard", "fused"])
def test_groups_and_rotations(online, group_size, kernel):
    """Other sums of floats than the reference's, and so other roundings now and then."""
    experts, x = stack(WeightArgs(num_bits=4, group_size=group_size), ActivationArgs(num_bits=8), online), rows(6)
    expected, made = experts(x, OFFS), kernel()
    found = experts(x, OFFS)
    assert made == [6]
    assert ((found - expected).norm() / expected.norm()).item() < (5e-3 if online else 1e-6)


@pytest.mark.parametrize(
    ("weights", "activations"),
    [
        (WeightArgs(num_bits=4, group_size=16), ActivationArgs(num_bits=8)),
        (WeightArgs(num_bits=4), None),
        (WeightArgs(num_bits=4), ActivationArgs(num_bits=4, runtime_smooth=RuntimeSmoothArgs(group_size=64))),
        (WeightArgs(num_bits=4, format="mxfp4", group_size=32), ActivationArgs(num_bits=4, format="mxfp4")),
    ],
    ids=["groups", "float activations", "runtime smooth", "mxfp4"],
)
def test_what_the_kernel_does_not_know_goes_expert_by_expert(weights, activations, kernel):
    experts, x = stack(weights, activations), rows(6)
    expected, made = experts(x, OFFS), kernel()
    found = experts(x, OFFS)
    assert not made
    assert ((found - expected).norm() / expected.norm()).item() < 5e-3


def test_the_layout_is_made_once_never_saved_and_follows_the_buffers(kernel):
    kernel()
    args = WeightArgs(num_bits=4), ActivationArgs(num_bits=8)
    experts, other, x = stack(*args), stack(*args), rows(6)
    other.scale *= 2
    saved = list(experts.state_dict())
    experts(x, OFFS)
    packed = experts.packed()
    experts(x, OFFS)
    assert experts.packed() is packed
    assert list(experts.state_dict()) == saved
    assert copy.deepcopy(experts)._packed is None
    experts.load_state_dict(other.state_dict())
    assert torch.equal(experts(x, OFFS), other(x, OFFS))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_a_mixture_of_transformers(implementation, artifact_mixture, kernel):
    model, ids = load(artifact_mixture.directory, engine="reference"), torch.arange(2, 14)[None]
    for module in model.modules():
        if isinstance(module, QuantizedExperts):  # which no kernel has in groups of 16
            weights = WeightArgs(num_bits=4)
            weight = RoundToNearest().quantize(module.qtensor().dequantize(), weights, None, torch.float32)
            module.scheme = Scheme(weights=weights, activations=module.scheme.activations)
            module.qweight, module.scale = weight.data, weight.scale
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        expected, made = model(ids, output_hidden_states=True).hidden_states[-1], kernel()
        found = model(ids, output_hidden_states=True).hidden_states[-1]
    assert made
    assert torch.equal(found, expected)
