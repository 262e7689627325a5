"""Checkpoints are rounded without the model's code, and transformers reads what is written."""

import json

import pytest
import torch
import transformers
from helpers import quantized_sources
from helpers.quantized_sources import is_linear, rewrite, small_llama, tensors_of
from helpers.weights import rounded_to_levels
from safetensors.torch import save_file

import quantize
from quantize.checkpoint.opening import open_checkpoint, open_files
from quantize.errors import UsageError
from quantize.export.model_free import files
from quantize.export.model_free.forms import FORMS
from quantize.export.model_free.plan import recipe_without_model
from quantize.quantizers.rtn import RoundToNearest

PLAIN = {"quantizer": {"name": "rtn"}}


def unknown(directory):
    """Give a model an architecture that no library knows."""
    config = json.loads((directory / "config.json").read_text())
    config |= {"architectures": ["NewForCausalLM"], "model_type": "new"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def read_again(directory):
    """Return all tensors of a checkpoint as floats."""
    found = open_files(directory)
    return {name: found.float_tensor(name) for name in found.sources}


def run(model, output, **settings):
    settings = {"scheme": "W4A16", "recipe": PLAIN, "group_size": 32} | settings
    return quantize.quantize_model_free(model, output_dir=output, **settings)


def rounded(W, scale_dtype=None, size=32):
    args = recipe_without_model(FORMS["compressed-tensors"], "W4A16", PLAIN, None, group_size=size).weights
    return RoundToNearest().quantize(W.float(), args, None, scale_dtype or W.dtype).dequantize()


def test_an_unknown_architecture_is_rounded_and_its_error_says_how(tmp_path):
    directory = unknown(small_llama(tmp_path / "model", torch.bfloat16))
    with pytest.raises(UsageError, match=r"has no NewForCausalLM, .*round its weights without the model, with --model"):
        open_checkpoint(directory)
    result, before = run(directory, tmp_path / "out", ignore=("k_proj",)), tensors_of(directory)
    after = read_again(tmp_path / "out")
    assert after.keys() == before.keys()
    for name, W in before.items():
        whole = is_linear(name) and "k_proj" not in name
        assert torch.equal(after[name], rounded(W) if whole else W.float()), name
        assert (result.manifest["coverage"].get(name) == "quantized") == whole
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["NewForCausalLM"]
    assert "model.layers.0.self_attn.k_proj" in config["quantization_config"]["ignore"]
    assert result.summary().startswith(f"{tmp_path / 'out'}: W4A16 in 12 linears, ")


@torch.no_grad()
def test_transformers_reads_what_is_written(tmp_path):
    directory = small_llama(tmp_path / "model")
    run(directory, tmp_path / "out", scheme="W8A8", group_size=None)
    ids = torch.arange(2, 34)[None]
    found = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = transformers.LlamaForCausalLM.from_pretrained(directory)
    logits = expected(ids).logits
    assert 0 < float((found(ids).logits - logits).norm() / logits.norm()) < 0.05
    with pytest.raises(UsageError, match=r"out was made without the model, as 'compressed-tensors'; load it with"):
        quantize.load(tmp_path / "out")


def test_scales_are_searched_for(tmp_path):
    directory = small_llama(tmp_path / "model")
    run(directory, tmp_path / "plain")
    run(directory, tmp_path / "searched", recipe=None)
    before, name = tensors_of(directory), "model.layers.0.mlp.up_proj.weight"
    errors = [float((read_again(tmp_path / out)[name] - before[name]).norm()) for out in ("plain", "searched")]
    assert errors[1] < 0.98 * errors[0]


def test_experts_one_by_one_and_in_stacks(tmp_path):
    directory = small_llama(tmp_path / "one", family="mixtral")
    run(directory, tmp_path / "one-out", group_size=16)
    before, after = tensors_of(directory), read_again(tmp_path / "one-out")
    router = next(name for name in before if name.endswith(("gate.weight", "router.weight")))
    assert torch.equal(after[router], before[router].float())
    expert = next(name for name in before if ".experts.1." in name)
    assert torch.equal(after[expert], rounded(before[expert], size=16))
    directory = unknown(quantized_sources.mxfp4_experts(tmp_path / "stack"))
    result = run(directory, tmp_path / "stack-out", scheme="MXFP4", group_size=None)
    source, after = open_files(directory), read_again(tmp_path / "stack-out")
    name = "model.layers.0.mlp.experts.down_proj"
    for expert, W in enumerate(source.float_tensor(name)):
        place = f"model.layers.0.mlp.experts.{expert}.down_proj"
        assert torch.equal(after[f"{place}.weight"], W.T)
        assert place in result.manifest["kept_grids"]
    settings = json.loads((tmp_path / "stack-out" / "config.json").read_text())["quantization_config"]
    assert settings["config_groups"]["group_0"]["format"] == "mxfp4-pack-quantized"


def test_grids_are_kept(tmp_path):
    tensors = tensors_of(small_llama(tmp_path / "model"))
    rewrite(tmp_path / "model", {k: rounded_to_levels(x, 7) if is_linear(k) else x for k, x in tensors.items()})
    result = run(tmp_path / "model", tmp_path / "out")
    before, after = tensors_of(tmp_path / "model"), read_again(tmp_path / "out")
    assert len(result.manifest["kept_grids"]) == 14
    for name in filter(is_linear, before):
        torch.testing.assert_close(after[name], before[name], rtol=1e-6, atol=0)
    assert not run(tmp_path / "model", tmp_path / "anew", requantize=True).manifest["kept_grids"]


def test_sources_are_read_and_their_exceptions_stay(tmp_path):
    directory = unknown(quantized_sources.fp8(tmp_path / "model"))
    run(directory, tmp_path / "out")
    source, after = open_files(directory), read_again(tmp_path / "out")
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(after[name], rounded(source.float_tensor(name), torch.bfloat16))
    assert torch.equal(after["lm_head.weight"], source.float_tensor("lm_head.weight"))
    assert not [name for name in after if "scale_inv" in name]


@pytest.mark.parametrize("changes", [{}, {"weights": {"symmetric": False}}, {"scheme": "W8A8"}, {"scheme": "MXFP4"}])
def test_pieces_make_the_same_bytes(tmp_path, monkeypatch, changes):
    """The smallest piece has the rows whose zero points share a word."""
    directory = small_llama(tmp_path / "model", torch.bfloat16)
    changes = dict(changes)
    scheme = changes.pop("scheme", "W4A16")
    settings = {"scheme": scheme, "recipe": PLAIN | changes, "group_size": 32 if scheme == "W4A16" else None}
    run(directory, tmp_path / "whole", **settings)
    monkeypatch.setattr(files, "PIECE", 1)
    run(directory, tmp_path / "pieces", **settings)
    whole, parts = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("whole", "pieces"))
    assert whole == parts


def in_two_files(directory):
    tensors = tensors_of(directory)
    (directory / "model.safetensors").unlink()
    places = {name: f"model-{1 + ('layers.1' in name):05}-of-00002.safetensors" for name in tensors}
    for file in set(places.values()):
        save_file({name: x for name, x in tensors.items() if places[name] == file}, directory / file, {"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return directory


def test_a_run_goes_on_behind_the_last_file(tmp_path, monkeypatch):
    directory = in_two_files(small_llama(tmp_path / "model"))
    run(directory, tmp_path / "straight")
    write, written = files.write_weight, []

    def killed(plan, out, name):
        if "layers.1" in name and len(written) < 9:
            raise KeyboardInterrupt
        written.append(name)
        return write(plan, out, name)

    monkeypatch.setattr(files, "write_weight", killed)
    with pytest.raises(KeyboardInterrupt):
        run(directory, tmp_path / "out")
    assert len(written) == 7
    written += ["", ""]
    run(directory, tmp_path / "out", resume=True)
    assert len(written) == 16
    for path in (tmp_path / "straight").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"recipe": {"passes": [{"name": "fold_norms"}]}}, "recipe: passes cannot be followed without the model"),
        ({"recipe": {"quantizer": {"name": "gptq"}}}, "recipe: quantizer cannot be followed without the model"),
        (
            {"scheme": "NVFP4", "group_size": None},
            "NVFP4 as compressed-tensors needs ranges of activations, which only",
        ),
        ({"ignore": ("q_prog",)}, "'q_prog' matches no linear; near are q_proj"),
        ({"ignore": ("*proj",)}, "holds no weight to round"),
    ],
)
def test_what_needs_the_model_is_refused(tmp_path, settings, words):
    directory = small_llama(tmp_path / "model")
    with pytest.raises(UsageError, match=words):
        run(directory, tmp_path / "out", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
