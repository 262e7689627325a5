"""LoRA adapters are merged while weights are read; the figures are those of the formula, in float64."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize.checkpoint.opening import open_checkpoint
from quantize.errors import QuantizeError, UsageError

UP, LAYER = "model.layers.0.mlp.up_proj.weight", "base_model.model.model.layers.0.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def adapter(one_layer, tmp_path):
    """Return a function that writes an adapter of rank 4 of `one_layer`'s up and down projections."""

    def make(tensors=None, **config):
        base, g, directory = open_checkpoint(one_layer), torch.Generator().manual_seed(0), tmp_path / "adapter"
        directory.mkdir()
        made = {}
        for name in (UP, DOWN):
            N, K = base.tensor(name).shape
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            made |= {
                f"{stem}.lora_A.weight": torch.randn(4, K, generator=g),
                f"{stem}.lora_B.weight": torch.randn(N, 4, generator=g),
            }
        save_file(made | (tensors or {}), directory / "adapter_model.safetensors")
        content = {"peft_type": "LORA", "base_model_name_or_path": "some/base", "r": 4, "lora_alpha": 8, "bias": "none"}
        (directory / "adapter_config.json").write_text(json.dumps(content | config))
        return directory

    return make


@pytest.mark.parametrize(
    ("config", "scale", "scale_down"),
    [({}, 2, 2), ({"use_rslora": True}, 4, 4), ({"alpha_pattern": {"down_proj": 2}}, 2, 0.5)],
)
def test_factors_are_added_with_their_scale(config, scale, scale_down, adapter, one_layer):
    directory = adapter(**config)
    base, found, factors = (
        open_checkpoint(one_layer),
        open_checkpoint(one_layer, directory),
        load_file(directory / "adapter_model.safetensors"),
    )
    for name, s in ((UP, scale), (DOWN, scale_down)):
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        A, B = (factors[f"{stem}.lora_{x}.weight"].double() for x in "AB")
        torch.testing.assert_close(
            found.float_tensor(name).double(), base.tensor(name).double() + s * B @ A, rtol=1e-5, atol=1e-5
        )
    other = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(found.tensor(other), base.tensor(other))


def test_a_tensor_that_was_trained_whole_takes_the_place_of_the_base_s(adapter, one_layer):
    norm = torch.full((64,), 3.0)
    found = open_checkpoint(one_layer, adapter({"base_model.model.model.norm.weight": norm}))
    assert torch.equal(found.tensor("model.norm.weight"), norm)


def test_stored_dtypes_stay(adapter, variant):
    model = variant()
    tensors = {name: x.bfloat16() for name, x in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    found = open_checkpoint(model, adapter())
    assert found.tensor(UP).dtype == torch.bfloat16
    assert torch.equal(found.tensor(UP), found.float_tensor(UP).bfloat16())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "has peft_type 'IA3'; only plain LoRA is merged"),
        ({"use_dora": True}, "has use_dora; only plain LoRA"),
        ({"bias": "all"}, "has bias 'all'; only plain"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "has target_parameters; only"),
    ],
)
def test_other_adapters_are_refused(config, message, adapter, one_layer):
    with pytest.raises(UsageError, match=message):
        open_checkpoint(one_layer, adapter(**config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_alpha": "x"}, "gives no scale for"),
        ({"lora_alpha": 1e400}, "the scale inf"),
        ({"alpha_pattern": 5}, "no scale"),
        ({"alpha_pattern": {"(((": 5}}, "no scale"),
        ({"lora_alpha": 10**400}, "no scale"),
        ({"alpha_pattern": {f"x{i}": 1 for i in range(5)}}, "has 5 patterns for an adapter of 4 tensors"),
    ],
)
def test_wrong_scales(config, message, adapter, one_layer):
    with pytest.raises(QuantizeError, match=message):
        open_checkpoint(one_layer, adapter(**config))


def test_an_adapter_of_another_model(adapter, one_layer):
    wide = {f"{LAYER}.lora_A.weight": torch.ones(4, 60)}
    with pytest.raises(
        QuantizeError, match=r"changes model.layers.0.mlp.up_proj.weight by \[172, 60\], where the base"
    ):
        open_checkpoint(one_layer, adapter(wide)).tensor(UP)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ((torch.tensor(1.0), torch.tensor(1.0)), "gives no scale for"),
        ((torch.ones(0, 64), torch.ones(172, 0)), "gives no scale for"),
        ((torch.ones(4), torch.ones(172)), r"the factors of .* are \[4\], \[172\]"),
        ((torch.ones(1, 300_000), torch.ones(300_000, 1)), r"changes .* by \[300000, 300000\], where the base"),
        ((torch.ones(4, 64), torch.ones(172, 4, dtype=torch.complex64)), "of torch.complex64; an adapter has floating"),
        ((torch.ones(4, 64, dtype=torch.int64), torch.ones(172, 4)), "of torch.int64; an adapter has floating point"),
    ],
)
def test_factors_that_are_none(factors, message, adapter, one_layer):
    """The product of the two long ones would take 360 GB."""
    with pytest.raises(QuantizeError, match=message):
        open_checkpoint(
            one_layer, adapter({f"{LAYER}.lora_{x}.weight": t for x, t in zip("AB", factors, strict=True)})
        ).tensor(UP)


def test_an_adapter_of_what_the_base_does_not_have(adapter, one_layer):
    lora = {f"base_model.model.vision.proj.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}
    with pytest.raises(QuantizeError, match=r"vision.proj.lora_A.weight, which changes no weight of the base"):
        open_checkpoint(one_layer, adapter(lora))


def test_an_adapter_alone_says_what_it_is_of(adapter):
    with pytest.raises(UsageError, match=r"holds an adapter of 'some/base'; give the base with --adapter"):
        open_checkpoint(adapter())


def test_a_run_quantizes_the_merged_weights(adapter, one_layer, small_run):
    directory, plain = adapter(), {"passes": [], "quantizer": {"name": "rtn"}}
    out = small_run(one_layer, "W8A8", adapter=directory, recipe=plain)
    merged = open_checkpoint(one_layer, directory).tensor(UP)
    found = out.load().get_submodule(UP.removesuffix(".weight")).qtensor().dequantize()
    assert float((found - merged).norm() / merged.norm()) < 0.01
    assert float((found - open_checkpoint(one_layer).tensor(UP)).norm() / merged.norm()) > 0.1
    assert not list(out.directory.glob("adapter*"))
