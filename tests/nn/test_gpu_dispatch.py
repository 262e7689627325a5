"""Quantized linears with rotations, runtime smooth and FP4 on the GPU kernels, in Triton's interpreter."""

import copy

import pytest
import torch
from helpers.operands import rng

from quantize.artifact.load import load
from quantize.errors import UsageError
from quantize.formats import get_format
from quantize.kernels import engine, fp4_quantizer, smooth_maxima, token_quantizer
from quantize.nn import quantized_experts, quantized_linear
from quantize.nn.device import on_device
from quantize.nn.gpu_dispatch import has_gpu_kernel
from quantize.nn.quantized_experts import QuantizedExperts
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.quantizers import QUANTIZERS
from quantize.scheme.scheme import ActivationArgs, RuntimeSmoothArgs, Scheme, WeightArgs
from quantize.transforms.online import Hadamard

pytestmark = pytest.mark.usefixtures("poisoned")

QUANTIZER_KERNELS = {"fp4": fp4_quantizer, "maxima": smooth_maxima, "tokens": token_quantizer}


@pytest.fixture
def kernels(monkeypatch):
    """Turn the kernels on; gives what their quantizers were called with. A function."""
    calls = []

    def turn_on():
        for name, module in QUANTIZER_KERNELS.items():

            def counted(*args, launch=module.launch, name=name):
                calls.append((name, args))
                return launch(*args)

            monkeypatch.setattr(module, "launch", counted)
        monkeypatch.setattr(engine, "runs_on_triton", lambda x: True)
        return calls

    return turn_on


def layer_of(weights, activations, online=(), columns=256):
    """[24, columns], random."""
    W = torch.randn(24, columns, generator=rng())
    packed = QUANTIZERS["rtn"]().quantize(W, weights, None, torch.float32)
    bias = torch.randn(24, generator=rng(1))
    return QuantizedLinear(packed, bias, Scheme(weights=weights, activations=activations), online)


def tokens(dtype=torch.float32, columns=256):
    return torch.randn(2, 3, columns, generator=rng(2)).to(dtype)


def assert_near(y, expected):
    """But for codes that fall on ties, as a rotation's sums have another order."""
    assert y.dtype == expected.dtype
    assert y.shape == expected.shape
    assert ((y - expected).norm() / expected.norm()).item() < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_fp4(name, dtype, kernels):
    weights = WeightArgs(num_bits=4, format=name, group_size=get_format(name).group_size)
    layer, x = layer_of(weights, ActivationArgs(num_bits=4, format=name)).to(dtype), tokens(dtype)
    expected, calls = layer(x), kernels()
    step = {torch.float32: 1e-6, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(layer(x), expected, rtol=step, atol=step * expected.abs().max().item())
    assert [call[0] for call in calls] == ["fp4"]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_runtime_smooth(bits, symmetric, kernels):
    smooth = RuntimeSmoothArgs(group_size=64, normalize_tokens=False)
    weights = WeightArgs(num_bits=bits, symmetric=symmetric)
    layer = layer_of(weights, ActivationArgs(num_bits=4, symmetric=symmetric, runtime_smooth=smooth))
    x = tokens()
    expected, calls = layer(x), kernels()
    assert torch.equal(layer(x), expected)
    assert [call[0] for call in calls] == ["maxima", "tokens"]


@pytest.mark.parametrize("activations", [None, ActivationArgs(num_bits=8), ActivationArgs(num_bits=4)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_of_3_bits_run_on_the_kernels_of_4(symmetric, activations, kernels):
    layer = layer_of(WeightArgs(num_bits=3, symmetric=symmetric, group_size=64), activations)
    x, least = tokens(), WeightArgs(num_bits=3, symmetric=symmetric, group_size=8)
    expected, _ = layer(x), kernels()
    assert has_gpu_kernel(x, layer.qtensor(), activations)
    assert not has_gpu_kernel(x, layer_of(least, activations).qtensor(), activations)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "activations"),
    [("iq4_nl", None), ("iq4_nl", ActivationArgs(num_bits=8)), ("nf4", None), ("q4_1", None)],
)
def test_code_books_and_zero_points_between_integers(name, activations, kernels):
    weights = WeightArgs(num_bits=4, format=name, group_size=32, symmetric=name != "q4_1")
    layer, x = layer_of(weights, activations), tokens()
    expected, _ = layer(x), kernels()
    assert has_gpu_kernel(x, layer.qtensor(), activations)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)


ROTATED = {
    "W4A8": (WeightArgs(num_bits=4), ActivationArgs(num_bits=8), 1),
    "W8A8, smooth": (WeightArgs(num_bits=8), ActivationArgs(num_bits=8, runtime_smooth=RuntimeSmoothArgs()), 2),
    "MXFP4": (WeightArgs(num_bits=4, format="mxfp4", group_size=32), ActivationArgs(num_bits=4, format="mxfp4"), 1),
}


@pytest.mark.parametrize("scheme", ROTATED)
@pytest.mark.parametrize("size", [32, 128])
def test_a_small_hadamard_transform_runs_inside(scheme, size, kernels):
    weights, activations, launches = ROTATED[scheme]
    online = [Hadamard(2, 128), Hadamard(size)]
    layer, x = layer_of(weights, activations, online), tokens()
    expected, calls = layer(x), kernels()
    layer.online[1].forward = None  # is not called
    assert_near(layer(x), expected)
    assert len(calls) == launches


@pytest.mark.parametrize("online", [Hadamard(8), Hadamard(32, 8), Hadamard(192)])
def test_other_transforms_run_in_front(online, kernels):
    layer, x = layer_of(WeightArgs(num_bits=4), ActivationArgs(num_bits=8), [online], 768), tokens(columns=768)
    expected, calls = layer(x), kernels()
    assert torch.equal(layer(x), expected)
    assert calls[0][1][-1].hadamard == 0


def test_smooth_groups_that_no_kernel_knows(kernels):
    activations = ActivationArgs(num_bits=4, runtime_smooth=RuntimeSmoothArgs(group_size=48))
    layer, x = layer_of(WeightArgs(num_bits=4), activations), tokens()
    expected, calls = layer(x), kernels()
    assert torch.equal(layer(x), expected)
    assert not calls


def test_rows_of_a_prefix_are_not_quantized(kernels):
    layer, x = layer_of(WeightArgs(num_bits=4), ActivationArgs(num_bits=8), [Hadamard(2, 128)]), tokens()
    layer.leading.tokens, layer.leading.shape = (5,), (2, 3)
    expected, calls = layer(x), kernels()
    assert torch.equal(layer(x), expected)
    assert calls[0][1][0].shape == (4, 256)


@pytest.mark.parametrize("scheme", ROTATED)
def test_compiles_without_a_break(scheme, kernels):
    layer, x = layer_of(*ROTATED[scheme][:2], [Hadamard(32)]), tokens()
    kernels()
    expected = layer(x)
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), expected)


@pytest.mark.parametrize("scheme", ROTATED)
def test_what_is_laid_out_for_good_is_held_once_and_needs_no_first_call(scheme, kernels, monkeypatch):
    layer, x = layer_of(*ROTATED[scheme][:2], [Hadamard(32)]), tokens()
    expected = copy.deepcopy(layer)
    calls = kernels()
    monkeypatch.setattr(quantized_linear, "runs_fake_quant", lambda *_: False)  # as on a GPU
    layer.lay_out(torch.float32)
    assert not calls
    assert not layer.qweight.numel()
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), expected(x))


def test_what_is_laid_out_for_good_can_go_nowhere(kernels, monkeypatch):
    layer, x = layer_of(WeightArgs(num_bits=4), ActivationArgs(num_bits=8)), tokens()
    kernels()
    monkeypatch.setattr(quantized_linear, "runs_fake_quant", lambda *_: False)
    layer.lay_out(torch.float32)
    expected = layer(x)
    assert torch.equal(layer.to("cpu").float()(x), expected)
    for leaving in (layer.half, lambda: layer.to("meta"), layer.state_dict, lambda: copy.deepcopy(layer)):
        with pytest.raises(UsageError, match=r"laid out for cpu alone .* keep_stored=True"):
            leaving()
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("activations", [None, ActivationArgs(num_bits=8)])
def test_experts_are_laid_out_for_good(activations, kernels, monkeypatch):
    """Together where one kernel multiplies the rows of all, else one by one."""
    W = torch.randn(2 * 24, 256, generator=rng())
    scheme = Scheme(weights=WeightArgs(num_bits=4, group_size=64), activations=activations)
    packed = QUANTIZERS["rtn"]().quantize(W, scheme.weights, None, torch.float32)
    layer, x, ends = QuantizedExperts(packed, None, scheme, count=2), tokens().flatten(0, 1), torch.tensor([4, 6])
    kernels()
    for module in (quantized_linear, quantized_experts):
        monkeypatch.setattr(module, "runs_fake_quant", lambda *_: False)
    expected = layer(x, ends)
    layer.lay_out(torch.float32)
    assert not layer.qweight.numel()
    assert torch.equal(layer(x, ends), expected)


@pytest.mark.slow
def test_a_loaded_model_compiles_before_it_has_run(artifact_one_layer, kernels, monkeypatch):
    """On a device whose type is not the CPU's, for which the meta device's name stands in; weights stay here."""
    model, ids = load(artifact_one_layer.directory, engine="reference"), torch.arange(5)[None]
    expected = model(ids, use_cache=False).logits
    kernels()
    monkeypatch.setattr(quantized_linear, "runs_fake_quant", lambda *_: False)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_: self)
    on_device(model, torch.device("meta"), torch.float32, keep_stored=False)
    linears = [x for x in model.modules() if isinstance(x, QuantizedLinear)]
    assert not any(x.qweight.numel() for x in linears)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
