"""The engine of loaded models on a CPU, beside the reference, on a small real model and on linears made by hand."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from helpers.json_files import change_json

from quantize import load
from quantize.errors import UsageError
from quantize.export.comparison import relative_error
from quantize.kernels.ops import dequantize, fake_quantize_dynamically, quantize_dynamically
from quantize.nn.cpu_engine import FEW_ROWS, LAST_INPUT, LastInput
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.pipeline.quantize import quantize_model
from quantize.quantizers.rtn import RoundToNearest
from quantize.scheme.scheme import ActivationArgs, RuntimeSmoothArgs, Scheme, WeightArgs
from quantize.transforms.online import Hadamard, Shift

IDS = torch.randint(4096, (2, 48), generator=torch.Generator().manual_seed(3))
HADAMARD = {"name": "rotate", "residual": False, "heads": False}
GROUPED = WeightArgs(num_bits=4, group_size=16, symmetric=False)
INT8, INT4 = ActivationArgs(num_bits=8), ActivationArgs(num_bits=4, symmetric=False, clip_ratio=0.9)
# NVFP4 rounds a group's sum in the reference and the whole sum here; a later layer may then round to another value
CLOSE = {"W8A8": 0.0, "W4A8": 0.0, "W4A4": 0.0, "W4A16": 1e-5, "MXFP4": 1e-3, "NVFP4": 0.05}


@pytest.fixture(scope="module")
def artifacts(books, tmp_path_factory):
    """Artifacts of two layers of books-llama-6m by scheme, rounded plainly behind Hadamards, and one with a prefix."""
    folder = tmp_path_factory.mktemp("engines")
    shutil.copytree(books, folder / "model")
    change_json(folder / "model" / "config.json", num_hidden_layers=2)

    def make(name, scheme, **recipe):
        passes = [] if scheme == "NVFP4" else [HADAMARD]
        recipe = {"passes": passes, "quantizer": {"name": "rtn"}, **recipe}
        return quantize_model(
            folder / "model", scheme=scheme, output_dir=folder / name, recipe=recipe, seqlen=32, nsamples=2
        )

    prefixed = make("prefix", "W4A8", prefix={"tokens": [5, 7]}, kv_cache={"num_bits": 8})
    return {scheme: make(scheme, scheme) for scheme in CLOSE} | {"prefix": prefixed}


@torch.no_grad()
def logits(model, **inputs):
    return model(input_ids=IDS, **inputs).logits


@pytest.mark.slow
@pytest.mark.parametrize("scheme", CLOSE)
def test_the_engine_is_as_close_to_the_reference_as_its_scheme_allows(artifacts, scheme):
    model, reference = (load(artifacts[scheme].directory, engine=engine) for engine in ("fake_quant", "reference"))
    assert relative_error([logits(model)], [logits(reference)]) <= CLOSE[scheme]
    assert all(layer.engine == "fake_quant" for layer in model.modules() if isinstance(layer, QuantizedLinear))
    assert model.state_dict().keys() == reference.state_dict().keys()
    prompt = {"input_ids": IDS[:1, :8], "attention_mask": torch.ones(1, 8, dtype=torch.long)}
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (1, 12)


@pytest.mark.slow
def test_a_prefix_and_a_quantized_cache_work_in_the_engine(artifacts):
    model, reference = (load(artifacts["prefix"].directory, engine=e) for e in ("fake_quant", "reference"))
    assert torch.equal(logits(model), logits(reference))
    plain = load(artifacts["W4A8"].directory)
    assert relative_error([logits(plain)], [logits(model)]) > 1e-3


def linear(weights=GROUPED, activations=INT8, online=(), dtype=torch.float32, engine="fake_quant", bias=True):
    """Return a linear of 64 columns and 24 rows, the same for the same arguments."""
    rng = torch.Generator().manual_seed(1)
    W, b = torch.randn(24, 64, generator=rng), torch.randn(24, generator=rng)
    packed = RoundToNearest().quantize(W, weights, None, dtype)
    layer = QuantizedLinear(
        packed, b.to(dtype) if bias else None, Scheme(weights=weights, activations=activations), online
    )
    layer.engine = engine
    return layer


def inputs(rows=3, dtype=torch.float32, seed=2):
    return (3 * torch.randn(2, rows, 64, generator=torch.Generator().manual_seed(seed)) + 1).to(dtype)


@pytest.mark.parametrize("activations", [INT8, INT4], ids=["int8", "int4"])
@pytest.mark.parametrize("weights", [GROUPED, WeightArgs(num_bits=8)], ids=["groups", "channels"])
@pytest.mark.parametrize("rows", [1, FEW_ROWS, 40])
def test_integers_are_the_reference_to_the_bit(weights, activations, rows):
    for online in ((), (Hadamard(64),), (Shift(torch.arange(64) / 64),)):
        fast, exact = (linear(weights, activations, online, engine=e) for e in ("fake_quant", "reference"))
        assert torch.equal(fast(inputs(rows)), exact(inputs(rows)))


def test_no_rows_give_no_rows():
    assert linear()(torch.zeros(2, 0, 64)).shape == (2, 0, 24)


def test_an_unpacked_reference_holds_integers_and_frees_them_afterwards():
    layer, x = linear(engine="reference"), inputs(40)
    expected, half = layer(x), layer(x.bfloat16())
    with layer.unpacked(torch.bfloat16):
        assert torch.equal(layer(x), expected)
        held = layer._held
        assert held is not None
        assert torch.equal(layer(x.bfloat16()), half)  # the reference's own product
        assert torch.equal(layer(x), expected)
        assert layer._held is held
    assert layer._held is None


@pytest.mark.parametrize("number_format", ["mxfp4", "nvfp4"])
def test_an_unpacked_reference_multiplies_fp4_in_one_product(number_format):
    args = ActivationArgs(num_bits=4, format=number_format)
    weights = WeightArgs(num_bits=4, format=number_format, group_size={"mxfp4": 32, "nvfp4": 16}[number_format])
    layer, x = linear(weights, args, dtype=torch.bfloat16, engine="reference"), inputs(40)  # a bias in bfloat16, too
    expected, half = layer(x), layer(x.bfloat16())
    with layer.unpacked(torch.bfloat16):
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
        assert layer._held is not None
        assert layer._held.values.dtype == torch.float32
        assert torch.equal(layer(x.bfloat16()), half)  # the reference's own product
    assert layer._held is None


@pytest.mark.parametrize("activations", [INT8, INT4, None], ids=["int8", "int4", "float"])
def test_half_precision_multiplies_dequantized_weights(activations):
    fast, exact = (linear(activations=activations, dtype=torch.bfloat16, engine=e) for e in ("fake_quant", "reference"))
    x = inputs(dtype=torch.bfloat16)
    assert fast(x).dtype == torch.bfloat16
    assert fast._held.values.dtype == torch.bfloat16
    torch.testing.assert_close(fast(x), exact(x), rtol=0.02, atol=0.2)


def test_runtime_smooth_stays_with_the_reference():
    args = ActivationArgs(num_bits=4, runtime_smooth=RuntimeSmoothArgs(group_size=16))
    weights = WeightArgs(num_bits=4)
    fast, exact = (linear(weights, args, engine=e) for e in ("fake_quant", "reference"))
    assert torch.equal(fast(inputs()), exact(inputs()))
    assert fast._held is None


@pytest.mark.parametrize("args", [INT8, INT4, *(ActivationArgs(num_bits=4, format=f) for f in ("mxfp4", "nvfp4"))])
def test_fake_quantization_equals_integers_to_the_bit(args):
    grid = (args.num_bits, args.symmetric, args.clip_ratio, args.format, {"mxfp4": 32, "nvfp4": 16}.get(args.format, 0))
    x = inputs(200)
    x[0, 0], x[0, 1], x[0, 2, ::2] = 0.0, 1e-42, -1e4
    assert torch.equal(fake_quantize_dynamically(x, *grid), dequantize(*quantize_dynamically(x, *grid)))


def test_the_held_weight_is_never_saved_and_dropped_when_buffers_change():
    layer, x = linear(), inputs()
    names = list(layer.state_dict())
    y = layer(x)
    assert layer._held is not None
    assert list(layer.state_dict()) == names
    layer.to(torch.float32)
    assert layer._held is None
    torch.testing.assert_close(layer(x), y, rtol=0, atol=0)
    doubled = {name: 2 * t if name in ("scale", "bias") else t for name, t in layer.state_dict().items()}
    layer.load_state_dict(doubled)
    assert layer._held is None
    torch.testing.assert_close(layer(x), 2 * y)
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert copy.deepcopy(layer).engine == "fake_quant"


def test_a_weight_held_in_inference_mode_takes_gradients_later():
    layer, x = linear(activations=None), inputs()
    with torch.inference_mode():
        layer(x)
    x.requires_grad_()
    for _ in range(2):
        layer(x).sum().backward()
    assert float(x.grad.abs().max()) > 0


@pytest.mark.parametrize("rows", [1, 40])
def test_gradients_are_those_of_the_reference(rows):
    """They reach the scale alone, since rounding has none."""
    found = []
    for engine in ("fake_quant", "reference"):
        x = inputs(rows).requires_grad_()
        linear(activations=INT4, online=[Hadamard(64)], engine=engine)(x).square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


def test_linears_that_read_the_same_tensor_quantize_it_once(monkeypatch):
    first, second, other = linear(online=[Hadamard(64)]), linear(online=[Hadamard(64)]), linear(online=[Hadamard(32)])
    x, calls = inputs(), []
    forward = Hadamard.forward
    monkeypatch.setattr(Hadamard, "forward", lambda self, x: calls.append(self.size) or forward(self, x))
    y = first(x)
    assert torch.equal(second(x), y)
    assert calls == [64]
    assert not torch.equal(other(x), y)
    assert calls == [64, 32]
    x += 1  # a change in place is noticed
    assert torch.equal(second(x), linear(online=[Hadamard(64)], engine="reference")(x))
    del x
    assert LAST_INPUT.last is None


def test_transforms_with_tensors_of_their_own_share_nothing():
    x = inputs()
    left, right = linear(online=[Shift(torch.zeros(64))]), linear(online=[Shift(torch.ones(64))])
    assert not torch.equal(left(x), right(x))


def test_an_input_with_a_graph_or_without_a_version_is_not_shared():
    shared, x = LastInput(), inputs().requires_grad_()
    with torch.inference_mode():
        y = inputs()
    for given in (x, y):
        assert [shared.get(given, 0, found.pop) for found in ([1], [2])] == [1, 2]
    assert shared.last is None


def test_a_held_weight_follows_a_change_of_the_scheme():
    layer = linear()
    layer(inputs())
    layer.scheme = Scheme(weights=GROUPED)
    torch.testing.assert_close(layer(inputs()), linear(activations=None, engine="reference")(inputs()))


def test_an_unknown_engine_is_refused(artifact_rtn):
    with pytest.raises(UsageError, match="there is no engine 'fast'; choose fake_quant or reference"):
        load(artifact_rtn.directory, engine="fast")
