"""Checkpoints of the compressed-tensors format: tensors, config and models, checked with the package of that name."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from helpers.json_files import change_json
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompressedTensorsConfig,
    Dinov2Config,
    Dinov2Model,
    T5Config,
    T5EncoderModel,
)
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from quantize.artifact.load import load
from quantize.calibration.data import read_samples
from quantize.checkpoint.meta_model import build_skeleton
from quantize.checkpoint.opening import open_checkpoint
from quantize.errors import QuantizeError, UsageError
from quantize.export import EXPORTERS
from quantize.export.comparison import copy_with_replaced_linears, relative_error, with_float_activations
from quantize.export.compressed_tensors import export, format
from quantize.export.compressed_tensors.activation_ranges import input_divisors
from quantize.export.compressed_tensors.format import UNPACKED, quantization_config, storage, stored
from quantize.export.compressed_tensors.obstacles import obstacles
from quantize.export.directory import export_artifact
from quantize.export.hf_checkpoint import NotLoadedError, check_difference, outputs_of
from quantize.export.outline import Outline
from quantize.formats import get_format
from quantize.formats.fake_quantize import fake_quantize
from quantize.graph.export import quiet
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.quantizers.rtn import RoundToNearest
from quantize.scheme.scheme import ActivationArgs, Scheme, WeightArgs

RTN = {"quantizer": {"name": "rtn"}, "passes": []}
DEQUANTIZED = CompressedTensorsConfig(dequantize=True)
FLOAT32, BFLOAT16 = 2**-20, 2**-6  # a few last bits of either, relative to the output


def integers(bits, activation_bits=None, group_size=0, symmetric=True, symmetric_activations=True):
    activations = activation_bits and ActivationArgs(num_bits=activation_bits, symmetric=symmetric_activations)
    return Scheme(
        weights=WeightArgs(num_bits=bits, group_size=group_size, symmetric=symmetric), activations=activations
    )


def fp4(name):
    weights = WeightArgs(num_bits=4, format=name, group_size=get_format(name).group_size)
    return Scheme(weights=weights, activations=ActivationArgs(num_bits=4, format=name))


SCHEMES = {
    "W4A16": integers(4),
    "W4A16 in groups": integers(4, group_size=32, symmetric=False),
    "W4A16 asymmetric": integers(4, symmetric=False),
    "W3A16": integers(3),
    "W3A16 in groups": integers(3, group_size=32, symmetric=False),
    "W8A16": integers(8),
    "W8A16 asymmetric": integers(8, group_size=16, symmetric=False),
    "W8A8": integers(8, 8),
    "W8A8 asymmetric": integers(8, 8, symmetric=False, symmetric_activations=False),
    "W4A8": integers(4, 8, group_size=16, symmetric=False, symmetric_activations=False),
    "W4A8 packed": integers(4, 8, group_size=16),
    "W4A4": integers(4, 4, symmetric_activations=False),
    "W4A4 symmetric": integers(4, 4),
    "W6A6": integers(6, 6),
    "MXFP4": fp4("mxfp4"),
    "NVFP4": fp4("nvfp4"),
}


def random_linear(scheme, rows=28, columns=96):
    generator = torch.Generator().manual_seed(columns)
    W, bias = torch.randn(rows, columns, generator=generator) + 0.3, torch.randn(rows, generator=generator)
    return QuantizedLinear(RoundToNearest().quantize(W, scheme.weights, None, torch.float32), bias, scheme)


def inputs(columns=96):
    x = torch.randn(2, 50, columns, generator=torch.Generator().manual_seed(1)) + 0.7
    x[0, 0] = 0
    return x


def stored_by_the_package(weight, scheme):
    """What the package makes of the same weight, scales and zero points."""
    config = QuantizationConfig.model_validate(quantization_config({"0": scheme}, []))
    scale = weight.scale if scheme.weights.format == "int" else 2 * weight.unpack_scale()
    given = {"weight": weight.dequantize(), "weight_scale": scale}
    if weight.zero_point is not None:
        given["weight_zero_point"] = weight.zero_point
    if weight.global_scale is not None:
        given |= {"weight_global_scale": weight.global_scale.reciprocal()[None], "weight_scale": weight.scale.float()}
    return BaseCompressor.get_value_from_registry(storage(scheme)).compress(given, config.config_groups["group_0"])


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("rows", "columns"), [(28, 96), (7, 32)])
def test_tensors_are_those_that_the_package_writes(name, rows, columns):
    scheme = SCHEMES[name]
    weight = random_linear(scheme, rows, columns).qtensor()
    expected, found = stored_by_the_package(weight, scheme), stored(weight, format.is_packed(scheme))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key].view(tensor.dtype), tensor), key


@pytest.mark.parametrize(("bits", "words"), [(3, (4, 1)), (4, (5, 1)), (8, (10, 2))])
def test_rows_that_fill_no_word(bits, words):
    scheme = integers(bits, symmetric=False)
    weight = random_linear(scheme, 5, 37).qtensor()
    expected, found = stored_by_the_package(weight, scheme), stored(weight, True)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert found["weight_packed"].shape == (5, words[0])
    assert found["weight_zero_point"].shape == (words[1], 1)


def run_by_the_package(linear, x):
    """A linear as the package loads and runs it."""
    scheme, weight = linear.scheme, linear.qtensor()
    dtype = torch.float32 if scheme.weights.format == "int" else torch.bfloat16
    model = nn.Sequential(nn.Linear(linear.in_features, linear.out_features, dtype=dtype))
    config = QuantizationConfig.model_validate(quantization_config({"0": scheme}, []))
    given = {f"0.{key}": tensor for key, tensor in stored(weight, format.is_packed(scheme)).items()}
    if scheme.weights.format == "nvfp4":
        given["0.input_global_scale"] = 448 * 6 / x.abs().max().reshape(1)
    with quiet():
        apply_quantization_config(model, config)
        compressor = ModelCompressor(config)
        compressor.compress_model(model)
        model.load_state_dict({**given, "0.bias": linear.bias}, strict=True)
        compressor.decompress_model(model)
    assert torch.equal(model[0].weight, weight.dequantize().to(dtype)) or scheme.weights.format == "nvfp4"
    assert relative_error([model[0].weight], [weight.dequantize()]) < (FLOAT32 if dtype == torch.float32 else 2**-9)
    return model(x.to(dtype)).detach()


@pytest.mark.parametrize(
    "name", [name for name, s in SCHEMES.items() if not (s.activations and s.activations.symmetric)]
)
def test_the_package_computes_the_same_where_it_has_the_same_grid(name):
    linear, x = random_linear(SCHEMES[name]), inputs()
    assert relative_error([run_by_the_package(linear, x)], [linear(x)]) < FLOAT32


@pytest.mark.parametrize("name", [name for name, s in SCHEMES.items() if s.activations and s.activations.symmetric])
def test_symmetric_activations_differ_by_their_rounding_at_most(name):
    """Symmetric integers span half a step more; MXFP4's scales round up; NVFP4 has one global scale for all tokens."""
    linear, x = random_linear(SCHEMES[name]), inputs()
    y, exact = linear(x), linear._forward_float_activations(x)
    assert relative_error([run_by_the_package(linear, x)], [y]) < 2 * relative_error([y], [exact])


@pytest.mark.parametrize("bits", [4, 8])
def test_the_steps_of_symmetric_activations(bits):
    """max / (2ᵇ⁻¹ - ½), saturating at -2ᵇ⁻¹: all that is different."""
    linear, x = random_linear(integers(8, bits)), inputs()
    step = x.abs().amax(-1, keepdim=True).clamp(min=1e-9) / (2 ** (bits - 1) - 0.5)
    rounded = (x / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step
    assert relative_error([run_by_the_package(linear, x)], [linear._forward_float_activations(rounded)]) < FLOAT32
    assert relative_error([rounded], [fake_quantize(x, linear.scheme.activations)]) > FLOAT32


def exported(artifact, output, **arguments):
    parity = export_artifact(artifact.directory, "compressed-tensors", output, **arguments)
    with quiet():
        return parity, AutoModelForCausalLM.from_pretrained(output, dtype="auto")


def logits(model):
    tokens = torch.randint(512, (2, 12), generator=torch.Generator().manual_seed(3))
    with quiet(), torch.no_grad():
        return model(tokens).logits


def apart(model, artifact):
    """Distance of the logits of both, and what rounding activations makes of the artifact's."""
    expected = logits(artifact)
    exact = logits(copy_with_replaced_linears(artifact, with_float_activations))
    return relative_error([logits(model)], [expected]), relative_error([exact], [expected])


ROTATED = {
    "passes": [{"name": "fold_norms"}, {"name": "rotate", "online_hadamard": False}],
    "quantizer": {"name": "rtn"},
    "activations": {"clip_ratio": 1.0},
}
RECIPES = {
    "W4A16": RTN | {"weights": {"symmetric": True}},
    "W8A8": {"quantizer": {"name": "rtn"}},  # smoothed
    "W4A8": RTN,
    "W4A4": ROTATED,
}


@pytest.mark.parametrize("scheme", RECIPES)
def test_transformers_runs_what_was_quantized(scheme, small_run, one_layer, tmp_path):
    artifact, output = small_run(one_layer, scheme, recipe=RECIPES[scheme]), tmp_path / "checkpoint"
    parity, model = exported(artifact, output)
    assert parity["reference"] <= FLOAT32 + 2 * parity["activations"]
    assert (parity["activations"] == 0) == (scheme == "W4A16")
    found, rounding = apart(model, load(artifact.directory))
    assert found <= (FLOAT32 if scheme in ("W4A16", "W4A4") else 2 * rounding)  # W4A4: on the same grid
    config = json.loads((output / "config.json").read_text())
    assert config["tie_word_embeddings"] == (scheme != "W4A4")  # rotating unties
    assert config["quantization_config"]["format"] == ("pack-quantized" if scheme == "W4A16" else "int-quantized")
    assert (output / "generation_config.json").read_bytes() == (one_layer / "generation_config.json").read_bytes()
    tokens = AutoTokenizer.from_pretrained(output)("Once upon", return_tensors="pt")["input_ids"]
    with quiet():
        assert len(model.generate(tokens, max_new_tokens=3, do_sample=False)[0]) == tokens.numel() + 3


@pytest.mark.parametrize("scheme", ["W4A8", "W4A4"])
def test_the_recipes_for_vllm_are_packed_to_half_the_bytes(scheme, cli, small_run, one_layer, tmp_path):
    artifact = small_run(one_layer, scheme, target="vllm", recipe={"quantizer": {"name": "rtn"}}, group_size=4)
    shown = cli("export", artifact.directory, "--format", "compressed-tensors", "-o", tmp_path / "ct")
    assert shown.code == 0
    assert f"to serve it: vllm serve {tmp_path / 'ct'} --linear-backend humming\n" in shown.err
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"
    assert config["config_groups"]["group_0"]["input_activations"]["num_bits"] == int(scheme[-1])
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", dtype="auto")
    found, rounding = apart(model, artifact.load())
    assert found < 2 * rounding


def test_3_bits_load_in_transformers_and_vllm_is_said_not_to_serve_them(cli, small_run, one_layer, tmp_path):
    artifact = small_run(one_layer, "W3A16", recipe=RTN | {"weights": {"symmetric": True}}, group_size=4)
    shown = cli("export", artifact.directory, "--format", "compressed-tensors", "-o", tmp_path / "ct")
    assert "\nvLLM does not serve it: it has no product of these 3-bit weights; give W4A16\n" in shown.err
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "ct")
    assert torch.equal(logits(model), logits(load(artifact.directory)))


def test_packed_zero_points_load_where_weights_are_unpacked(small_run, one_layer, tmp_path):
    """In groups; the other way of loading fails in the package (llm-compressor issue 1618)."""
    artifact, output = small_run(one_layer, "W4A16", recipe=RTN, group_size=4), tmp_path / "checkpoint"
    parity = export_artifact(artifact.directory, "compressed-tensors", output)
    assert parity == {"reference": 0, "activations": 0, "transformers": UNPACKED}
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(output, quantization_config=DEQUANTIZED)
    assert torch.equal(logits(model), logits(load(artifact.directory)))
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(output)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)  # torch.compile changes it
    assert "RuntimeError: You set `ignore_mismatched_sizes` to `False`" in done.stderr


def test_a_model_whose_code_reads_weights_loads_where_they_are_unpacked(small_run, tmp_path):
    """T5 initializes the weights of its linears, which a packed linear does not have."""
    T5EncoderModel(T5Config(vocab_size=512, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)).save_pretrained(
        tmp_path / "model"
    )
    layers = [{"match": "wo", "group_size": 64}]  # another scheme, which is unpacked alike
    recipe = RTN | {"weights": {"symmetric": True}, "layers": layers}
    artifact, output = small_run(tmp_path / "model", "W4A16", recipe=recipe, group_size=32), tmp_path / "checkpoint"
    parity = export_artifact(artifact.directory, "compressed-tensors", output)
    assert (parity["transformers"], parity["reference"] < FLOAT32) == (UNPACKED, True)
    with quiet():
        assert T5EncoderModel.from_pretrained(output, quantization_config=DEQUANTIZED)
        with pytest.raises(
            NotLoadedError, match=r"T5EncoderModel, as its code reads the weight .* modeling_t5.py line"
        ):
            outputs_of(output, [])


def test_transformers_splits_no_compressed_tensors(small_run, tmp_path):
    """DINOv2's gate and first product, which this model does not even have, are one tensor in files."""
    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8)
    Dinov2Model(config).save_pretrained(tmp_path / "model")
    images = {"pixel_values": torch.randn(8, 3, 16, 16)}
    artifact = small_run(tmp_path / "model", "W8A8", recipe=RTN, calibration=images)
    with pytest.raises(NotLoadedError, match="it splits or joins tensors of this class, and no compressed ones"):
        export_artifact(artifact.directory, "compressed-tensors", tmp_path / "checkpoint")


@pytest.mark.parametrize("scheme", ["MXFP4", "NVFP4"])
def test_transformers_runs_fp4(scheme, small_run, one_layer, stories_calibration, tmp_path):
    artifact = small_run(one_layer, scheme, recipe=RTN, group_size=None, ignore=["down_proj"])
    data = {"calibration": stories_calibration} if scheme == "NVFP4" else {}
    parity, model = exported(artifact, tmp_path / "checkpoint", **data)
    assert model.dtype == torch.bfloat16
    assert parity["reference"] < BFLOAT16 + 2 * parity["activations"] < 0.5
    found, rounding = apart(model, load(artifact.directory))
    assert found < BFLOAT16 + 2 * rounding < 0.7
    assert hasattr(model.model.layers[0].mlp.up_proj, "input_global_scale") == (scheme == "NVFP4")
    if scheme == "NVFP4":  # vLLM holds them as one weight, with one scale for the whole
        attention = model.model.layers[0].self_attn
        assert len({float(x.weight_global_scale) for x in (attention.q_proj, attention.k_proj, attention.v_proj)}) == 1


def test_nvfp4_needs_ranges_and_nothing_else_does(small_run, one_layer, artifact_rtn, stories_calibration, tmp_path):
    artifact = small_run(one_layer, "NVFP4", recipe=RTN, group_size=None, ignore=["down_proj"])
    divisors = input_divisors(artifact.directory, stories_calibration)
    model, largest = load(artifact.directory), []
    model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda _, given: largest.append(given[0].abs().max()))
    with torch.no_grad():
        for row in read_samples(stories_calibration, 16, 2, None, 512).rows:
            model(row["input_ids"][None])
    found = divisors["model.layers.0.mlp.up_proj"]
    assert float(found) == pytest.approx(448 * 6 / float(max(largest)), rel=0.1)  # there with rounded activations
    for target, words in (
        ("onnx", "--calibration belongs to --format compressed-tensors, not to onnx; leave it out"),
        ("compressed-tensors", "only NVFP4"),
    ):
        with pytest.raises(UsageError, match=words):
            export_artifact(artifact_rtn.directory, target, tmp_path / "not-made", calibration=stories_calibration)
    assert not (tmp_path / "not-made").exists()


@pytest.mark.parametrize("name", SCHEMES)
def test_the_config_is_what_the_package_writes(name, one_layer, tmp_path):
    scheme, skeleton = SCHEMES[name], build_skeleton(open_checkpoint(one_layer).config)
    quantized = {path for path, m in skeleton.named_modules() if isinstance(m, nn.Linear) and "attn" in path}
    ours = quantization_config(
        dict.fromkeys(sorted(quantized), scheme), export.ignored(skeleton, dict.fromkeys(quantized), {})
    )
    with quiet():
        apply_quantization_config(skeleton, QuantizationConfig.model_validate(ours))
        compressor = ModelCompressor.from_pretrained_model(skeleton)
    (tmp_path / "config.json").write_text("{}")
    compressor.update_config(tmp_path)
    theirs = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert {path for path, m in skeleton.named_modules() if hasattr(m, "quantization_scheme")} == quantized
    assert theirs.pop("version")
    rest = ("sparsity_config", "transform_config", "moe_sparsity_config")
    assert not any(theirs.pop(key) for key in rest)
    assert ours == theirs


def test_an_encoder(small_run, minilm, tmp_path):
    shutil.copytree(minilm, tmp_path / "model")
    change_json(tmp_path / "model" / "config.json", num_hidden_layers=1)
    artifact = small_run(tmp_path / "model", "W8A8", recipe=RTN, calibration=None)
    parity = export_artifact(artifact.directory, "compressed-tensors", tmp_path / "checkpoint")
    assert 0 < parity["reference"] < 2 * parity["activations"]


UP = "model.layers.0.mlp.up_proj"
ONLINE = "`online_hadamard = false` in the pass that rotates"
REFUSED = {
    "rotation": ({"online": [{"kind": "hadamard", "size": 64, "stride": 1}]}, ONLINE),
    "dual rotation": ({"online": [{"kind": "dual"}]}, ONLINE),
    "matrices": ({"online": [{"kind": "blocks"}]}, "no pass `wush`"),
    "noise": ({"online": [{"kind": "shift"}]}, "no pass `noisy_bias`"),
    "clipping": (
        {"scheme": {"weights": {"num_bits": 4}, "activations": {"num_bits": 8, "clip_ratio": 0.9}}},
        "`clip_ratio = 1.0` in [activations] and no pass",
    ),
    "smoothing": (
        {"scheme": {"weights": {"num_bits": 4}, "activations": {"num_bits": 8, "runtime_smooth": {}}}},
        "no pass `runtime_smooth`",
    ),
    "zero points in a mixture": (
        {"scheme": {"weights": {"num_bits": 4, "symmetric": False, "group_size": 4}}},
        "beside linears of another scheme; quantize with `symmetric = true` in",
    ),
}


@pytest.mark.parametrize("group_size", [0, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_model_stored_in_bfloat16(symmetric, group_size, one_layer, small_run, tmp_path):
    """The package unpacks weights with zero points to the type of the model."""
    model = AutoModelForCausalLM.from_pretrained(one_layer, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    recipe = RTN | {"weights": {"symmetric": symmetric}}
    artifact = small_run(tmp_path / "model", "W4A16", recipe=recipe, group_size=group_size)
    parity = export_artifact(artifact.directory, "compressed-tensors", tmp_path / "checkpoint")
    assert parity["reference"] < FLOAT32


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_linear_cannot_do_is_refused(name, artifact_rtn):
    change, words = REFUSED[name]
    sound = Outline.read(artifact_rtn.directory)
    assert not list(obstacles(sound))
    modules = sound.settings["modules"]
    changed = replace(sound, settings=sound.settings | {"modules": modules | {UP: modules[UP] | change}})
    with pytest.raises(UsageError, match=re.escape(words)):
        EXPORTERS["compressed-tensors"].check(changed)


def test_what_a_model_cannot_do_is_refused(small_run, one_layer, tmp_path):
    artifact = small_run(one_layer, "W4A8", recipe=RTN | {"prefix": {"tokens": [1]}})
    with pytest.raises(UsageError, match="no `prefix`"):
        export_artifact(artifact.directory, "compressed-tensors", tmp_path / "no")


def test_keys_and_values_are_left_to_vllm(small_run, one_layer, tmp_path, cli):
    changes = RTN | {"kv_cache": {"num_bits": 4}}
    artifact = small_run(one_layer, "W4A8", target="vllm", recipe=changes)
    shown = cli("export", artifact.directory, "--format", "compressed-tensors", "--output-dir", tmp_path / "ct")
    assert shown.code == 0
    assert "--linear-backend humming --kv-cache-dtype int4_per_token_head\n" in shown.err
    with pytest.raises(UsageError, match=r"transformers cannot execute .* it holds keys and values in floating point"):
        small_run(one_layer, "W4A8", target="transformers", recipe=changes, output="other")
    changes = RTN | {"kv_cache": {"num_bits": 8, "value_bits": 4}}
    with pytest.raises(UsageError, match=r"has no place for keys and values of different bits; .* no `value_bits`"):
        small_run(one_layer, "W4A8", target="vllm", recipe=changes, output="other")
    changes = RTN | {"kv_cache": {"num_bits": 4, "residual_length": 16}}
    with pytest.raises(UsageError, match=r"no place for recent keys and values in floating point; .* no `residual_le"):
        small_run(one_layer, "W4A8", target="vllm", recipe=changes, output="other")


def test_all_obstacles_are_named_at_once(cli, artifact_one_layer, tmp_path):
    """The default of W4A4."""
    shown = cli(
        "export", artifact_one_layer.directory, "--format", "compressed-tensors", "--output-dir", tmp_path / "no"
    )
    assert shown.code == 2
    assert "compressed-tensors has no place for clipped activations or a rotation of activations; quantize" in shown.err
    assert f"no pass `activation_clip` and {ONLINE}" in shown.err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("kind", [Conv1D, FalconLinear])
def test_a_module_that_is_no_plain_linear(artifact_rtn, kind):
    outline = Outline.read(artifact_rtn.directory)
    outline.skeleton.set_submodule("model.layers.0.mlp.up_proj", kind(172, 64))
    with pytest.raises(
        UsageError, match=rf"up_proj, of the class {kind.__name__} and no plain nn.Linear; .* --ignore up"
    ):
        EXPORTERS["compressed-tensors"].check(outline)


def test_a_checkpoint_that_computes_something_else_is_noticed(artifact_rtn, tmp_path, monkeypatch):
    monkeypatch.setattr(format, "SIGN_BITS", 0)
    with pytest.raises(
        QuantizeError, match=r"transformers differs from the artifact by .* and rounding explains at most"
    ):
        export_artifact(artifact_rtn.directory, "compressed-tensors", tmp_path / "no")
    monkeypatch.setattr(export, "quantization_config", lambda *_: {"quant_method": "no-such-method"})
    with pytest.raises(QuantizeError, match="transformers cannot load the checkpoint"):
        export_artifact(artifact_rtn.directory, "compressed-tensors", tmp_path / "no")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("numbers", "refused"), [(2, False), (64, True)])
def test_few_numbers_may_differ_by_more_of_their_rounding(numbers, refused):
    """Of a classifier with two classes four logits are compared."""
    outputs = [torch.zeros(1, numbers), torch.zeros(1, 100)]
    with pytest.raises(QuantizeError, match="differs from the artifact by 0") if refused else nullcontext():
        check_difference(0.06, 1e-7, 0.02, outputs)


def test_without_the_package_nothing_is_verified_and_the_manifest_says_so(cli, artifact_rtn, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda _: None)
    arguments = ["--format", "compressed-tensors", "--output-dir", tmp_path / "checkpoint"]
    shown = cli("export", artifact_rtn.directory, *arguments)
    assert (shown.code, shown.out) == (0, f"{tmp_path / 'checkpoint'}: transformers not verified\n")
    manifest = json.loads((tmp_path / "checkpoint" / "manifest.json").read_text())
    assert manifest["parity"] == {"transformers": "not verified"}
