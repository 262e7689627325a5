"""Products in bfloat16 where the processor has units for them and the model is stored so, and what they cost."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantize.calibration import precision
from quantize.calibration.precision import plus_product
from quantize.calibration.statistics import Gram
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.pipeline.rng import derived_generator
from quantize.quantizers.base import QUANTIZERS
from quantize.scheme.scheme import Scheme, WeightArgs

GROUPED = WeightArgs(num_bits=4, group_size=32)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=derived_generator(seed))


def correlated(rows=2048, columns=128):
    return normal(rows, columns) @ (torch.eye(columns) + 0.2 * normal(columns, columns, seed=1))


def gram_of(X, dtype=torch.float32):
    gram = Gram()
    for part in X.split(512):
        gram.update(part, dtype=dtype)
    return gram


def test_a_product_with_bfloat16_adds_in_float32():
    base, left, right = 1000 * normal(16, 24), normal(16, 64, seed=1), normal(64, 24, seed=2)
    exact = base + left @ right
    assert torch.equal(plus_product(base, left, right), torch.addmm(base, left, right))
    rounded = plus_product(base, left, right.bfloat16())
    assert 1e-4 < (rounded - exact).abs().max() < 0.2  # of a product of about 8; the base itself would lose up to 4


@pytest.mark.parametrize("sweeps", [0, 2])
def test_gptq_loses_nothing_by_products_in_bfloat16(sweeps):
    X, W, quantizer = correlated(), normal(64, 128, seed=3), QUANTIZERS["gptq"](sweeps=sweeps, block_size=32)
    exact = quantizer.quantize(W, GROUPED, gram_of(X), torch.float32)
    rounded = quantizer.quantize(W, GROUPED, gram_of(X, torch.bfloat16), torch.float32, torch.bfloat16)
    errors = [float(((W - q.dequantize()) @ X.T).square().sum()) for q in (exact, rounded)]
    assert not torch.equal(exact.data, rounded.data)
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


def quantized_linear():
    weight = QUANTIZERS["rtn"]().quantize(normal(48, 64), GROUPED, None, torch.float32)
    return QuantizedLinear(weight, normal(48, seed=1), Scheme(weights=GROUPED))


def test_an_unpacked_linear_computes_the_same(monkeypatch):
    module, x, unpack = quantized_linear(), normal(5, 64, seed=2), QuantizedLinear.qtensor
    monkeypatch.setattr("quantize.formats.qtensor.L2_ELEMENTS", 64 * 7)  # rows in pieces of 7
    apart = module(x)
    with module.unpacked(torch.float32):
        assert torch.equal(module(x), apart)
        assert unpack(module).dequantize() is unpack(module).dequantize()
        assert torch.equal(unpack(module).unpack(), module.weight_integers())
    assert unpack(module).dequantize() is not unpack(module).dequantize()


def test_an_unpacked_linear_multiplies_in_bfloat16():
    module, x = quantized_linear(), normal(5, 64, seed=2)
    exact = module(x)
    with module.unpacked(torch.bfloat16):
        found = module(x)
    assert found.dtype == torch.float32
    assert 1e-4 < (found - exact).norm() / exact.norm() < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(("stored", "units"), [("bfloat16", True), ("bfloat16", False), ("float32", True)])
def test_only_a_model_stored_in_bfloat16_is_calibrated_in_it(stored, units, one_layer, small_run, monkeypatch):
    asked = set()

    def watched(*args, **kwargs):
        asked.add(kwargs["product_dtype"] if "product_dtype" in kwargs else args[-1])
        return quantize_weights(*args, **kwargs)

    quantize_weights = QUANTIZERS["gptq"].quantize_weights
    monkeypatch.setattr(precision, "bfloat16_unit", lambda: "amx" if units else "none")
    monkeypatch.setattr(QUANTIZERS["gptq"], "quantize_weights", watched)
    small_run(AutoModelForCausalLM.from_pretrained(one_layer, dtype=getattr(torch, stored)))
    assert asked == {torch.bfloat16 if stored == "bfloat16" and units else torch.float32}
