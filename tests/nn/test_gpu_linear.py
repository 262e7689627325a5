"""Quantized linears and whole blocks on the GPU kernels, in Triton's interpreter, against the reference."""

from __future__ import annotations

import pytest
import torch
from helpers.operands import rng

from quantize import load
from quantize.formats.qtensor import QTensor
from quantize.kernels import custom_ops, engine, weight_only_gemm
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.scheme.scheme import ActivationArgs, Scheme, WeightArgs

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def kernels(monkeypatch):
    """Turn the kernels on; gives the dtypes of the results of their products. A function."""
    made = []

    def turn_on():
        def counted(*args, multiply=custom_ops.triton_gemm):
            made.append(multiply(*args))
            return made[-1]

        monkeypatch.setattr(engine, "runs_on_triton", lambda x: True)
        monkeypatch.setattr(custom_ops, "triton_gemm", counted)
        return made

    return turn_on


def linear(weights, activations, columns=256, seed=0):
    """[24, columns], random."""
    groups, b = columns // (weights.group_size or columns), weights.num_bits
    q = torch.randint(-(1 << b - 1), 1 << b - 1, (24, columns), generator=rng(seed))
    zero = None if weights.symmetric else torch.randint(-8, 8, (24, groups), generator=rng(seed + 1))
    packed = QTensor.pack(q, torch.rand(24, groups, generator=rng(seed + 2)) + 0.1, zero, weights)
    return QuantizedLinear(packed, torch.randn(24, generator=rng(3)), Scheme(weights=weights, activations=activations))


def rounded(scheme, model, run):
    return run(model, scheme, recipe={"passes": [], "quantizer": {"name": "rtn"}}).directory


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["W8A8", "W4A8", "W4A4"])
def test_a_whole_block(scheme, one_layer, small_run, artifact_one_layer, kernels):
    """Every integer product of a model, bit by bit; at W4A4 with rotations too, folded and online.

    The head multiplies floats by integers, so that its sums have another order.
    """
    directory = artifact_one_layer.directory if scheme == "W4A4" else rounded(scheme, one_layer, small_run)
    model = load(directory, engine="reference")
    ids = torch.randint(0, 512, (1, 9), generator=rng())
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True)
        made = kernels()
        found = model(ids, output_hidden_states=True)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(made) == sum(layer.scheme.activations is not None for layer in layers) >= 7
    assert torch.equal(found.hidden_states[-1], expected.hidden_states[-1])
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [0, 128, 64, 32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_linear(dtype, group_size, symmetric, kernels):
    grid = {"num_bits": 4, "symmetric": symmetric}
    layer = linear(WeightArgs(**grid, group_size=group_size), ActivationArgs(**grid)).to(dtype)
    x = torch.randn(2, 3, 256, generator=rng(7)).to(dtype)
    expected, made = layer(x), kernels()
    y = layer(x)
    assert [result.dtype for result in made] == [dtype]
    assert y.shape == (2, 3, 24)
    if group_size == 0:
        assert torch.equal(y, expected)
    step = 2.0**-10 if dtype == torch.float16 else 1e-6
    assert torch.allclose(y, expected, rtol=step, atol=1e-6 * float(expected.abs().max()))


def test_the_layout_is_made_once_and_never_saved(kernels):
    layer, x = linear(WeightArgs(num_bits=4), ActivationArgs(num_bits=8)), torch.randn(2, 256, generator=rng(7))
    saved = list(layer.state_dict())
    kernels()
    layer(x)
    packed = layer.packed()
    layer(x)
    assert layer.packed() is packed
    assert list(layer.state_dict()) == saved


@pytest.mark.parametrize("change", ["moved", "loaded"])
def test_the_layout_follows_the_buffers(change, kernels):
    kernels()
    args = WeightArgs(num_bits=4), ActivationArgs(num_bits=8)
    layer, other, x = linear(*args), linear(*args, seed=9), torch.randn(2, 256, generator=rng(7))
    layer(x)
    if change == "moved":
        layer.qweight, layer.scale = other.qweight.clone(), other.scale.clone()
        layer = layer.to("cpu")
    else:
        layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize(
    ("weights", "activations", "dtype"),
    [
        (WeightArgs(num_bits=4, group_size=16), ActivationArgs(num_bits=8), torch.float32),
        (WeightArgs(num_bits=4), ActivationArgs(num_bits=8), torch.float64),
        (WeightArgs(num_bits=4, group_size=8), None, torch.float32),
    ],
)
def test_what_no_kernel_knows_goes_to_the_reference(weights, activations, dtype, kernels):
    layer, x = linear(weights, activations).to(dtype), torch.randn(2, 256, generator=rng(7), dtype=dtype)
    expected, made = layer(x), kernels()
    assert torch.equal(layer(x), expected)
    assert not made


def test_compiles_without_a_break_once_laid_out(kernels):
    layer, x = linear(WeightArgs(num_bits=4), ActivationArgs(num_bits=4)), torch.randn(2, 256, generator=rng(7))
    kernels()
    expected = layer(x)
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), expected)


def test_compiling_lays_out_too(kernels):
    layer, x = linear(WeightArgs(num_bits=4, group_size=64), ActivationArgs(num_bits=8)), torch.randn(2, 256)
    kernels()
    assert torch.equal(torch.compile(layer, backend="eager")(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("bits", "symmetric", "group_size"), [(4, False, 128), (4, True, 32), (8, False, 0), (4, False, 0)]
)
def test_activations_in_floating_point(bits, symmetric, group_size, dtype, kernels, monkeypatch):
    """The weight stays as it is stored, and no copy of it is made."""
    layer = linear(WeightArgs(num_bits=bits, symmetric=symmetric, group_size=group_size), None).to(dtype)
    x, launched, launch = torch.randn(2, 3, 256, generator=rng(7)).to(dtype), [], weight_only_gemm.launch
    layer.engine = "reference"
    expected = layer(x)
    kernels()
    monkeypatch.setattr(weight_only_gemm, "launch", lambda *args: launched.append(args) or launch(*args))
    y = layer(x)
    assert y.dtype == dtype
    assert len(launched) == 1
    assert launched[0][1].data_ptr() == layer.qweight.data_ptr()
    step = 2.0**-9 if dtype == torch.float16 else 1e-5
    assert torch.allclose(y, expected, rtol=step, atol=step * float(expected.abs().max()))
