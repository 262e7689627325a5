"""Without the model's code an artifact or a GGUF file is written, too."""

import json
import shutil

import pytest
import torch
import transformers
from helpers import quantized_sources
from helpers.quantized_sources import CONFIG, rewrite, small_llama, tensors_of
from transformers.pytorch_utils import Conv1D

import quantize
from quantize.artifact.verify import verify_artifact
from quantize.checkpoint.expert_reader import read_expert
from quantize.checkpoint.opening import open_checkpoint
from quantize.errors import QuantizeError, UsageError
from quantize.export.comparison import relative_error
from quantize.export.directory import export_artifact
from quantize.export.model_free import files
from quantize.nn.quantized_experts import QuantizedExperts
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.quantizers.rtn import RoundToNearest

IDS = torch.arange(3, 35)[None]
PLAIN = {"quantizer": {"name": "rtn"}}
GPT2 = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 128, "n_positions": 128}


def run(model, output, format="artifact", **settings):
    settings = {"scheme": "W4A16", "recipe": PLAIN, "group_size": 16} | settings
    return quantize.quantize_model_free(model, output_dir=output, format=format, **settings)


def gpt2(directory):
    """Write a GPT-2 under the names that the hub has, whose linears are [in, out]."""
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).save_pretrained(directory)
    return rewrite(directory, {name.removeprefix("transformer."): x for name, x in tensors_of(directory).items()})


def make(kind, directory):
    return gpt2(directory) if kind == "gpt2" else small_llama(directory, family=None if kind == "llama" else kind)


@torch.no_grad()
def with_rounded_weights(found, directory):
    """Return the float model with each weight rounded to nearest that `found` has as integers, and how many."""
    model, count = open_checkpoint(directory).load(), 0
    for path, module in found.named_modules():
        if isinstance(module, QuantizedLinear):
            own = model.get_submodule(path)
            W, turned = own.weight, isinstance(own, Conv1D)
        elif isinstance(module, QuantizedExperts):
            W, turned = model.get_parameter(path), module.transposed
        else:
            continue
        own = (W.mT if turned else W).contiguous()
        args, matrices = module.scheme.weights, own if own.dim() == 3 else own[None]
        rounded = torch.stack([RoundToNearest().quantize(x, args, None, W.dtype).dequantize() for x in matrices])
        rounded = rounded.view_as(own)
        W.copy_(rounded.mT if turned else rounded)
        count += 1
    return model, count


@pytest.mark.parametrize(
    ("kind", "scheme", "count"),
    [("llama", "W4A16", 14), ("gpt2", "W4A16", 8), ("mixtral", "W4A16", 8), ("gpt_oss", "MXFP4", 4),
     ("llama", "NVFP4", 14), ("mixtral", "NVFP4", 8)],
)  # fmt: skip
@torch.no_grad()
def test_an_artifact_of_a_known_class_is_loaded(tmp_path, kind, scheme, count):
    directory, size = make(kind, tmp_path / "model"), 16 if scheme.startswith("W") else None
    recipe = PLAIN | ({"ignore": ["re:.*self_attn.*"]} if kind == "gpt_oss" else {})
    result = run(directory, tmp_path / "out", scheme=scheme, group_size=size, recipe=recipe)
    found = verify_artifact(tmp_path / "out", result.manifest["digest"])
    assert (found["difference"], found["why"]) == (None, "")
    loaded = quantize.load(tmp_path / "out")
    expected, rounded = with_rounded_weights(loaded, directory)
    assert rounded == count
    outputs = [model(IDS).logits for model in (loaded, expected)]
    limit = 1e-5 if scheme == "W4A16" else 0.3  # activations in 4 bits
    assert relative_error(outputs[:1], outputs[1:]) < limit
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert relative_error([again(IDS).logits], outputs[:1]) < 1e-5


def test_an_artifact_of_an_unknown_class_is_verified_and_says_why_it_is_not_loaded(tmp_path, cli):
    directory = small_llama(tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"architectures": ["NewModel"], "model_type": "new"}))
    run(directory, tmp_path / "out")
    shown = cli("verify", tmp_path / "out")
    assert "not loaded, as transformers" in shown.out, shown.err
    assert "has no class for 'NewModel', digest" in shown.out
    with pytest.raises(UsageError, match=r"was rounded without the model, and transformers .* has no class for 'NewMo"):
        quantize.load(tmp_path / "out")
    skeleton = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    loaded = quantize.load(tmp_path / "out", skeleton=skeleton)
    assert isinstance(loaded.get_submodule("model.layers.1.mlp.down_proj"), QuantizedLinear)
    (tmp_path / "out" / "recipe.toml").write_text("")
    with pytest.raises(QuantizeError, match=r"recipe.toml has changed since it was written"):
        verify_artifact(tmp_path / "out")


def test_what_needs_outputs_of_the_model_refuses_its_artifact(tmp_path, cli):
    run(small_llama(tmp_path / "model"), tmp_path / "out")
    assert "every tensor in its place, no output recorded" in cli("verify", tmp_path / "out").out
    with pytest.raises(UsageError, match="was rounded without the model, so it holds no outputs to compare an export"):
        export_artifact(tmp_path / "out", "onnx", tmp_path / "onnx")
    assert "nothing was measured that a page could show" in cli("report", tmp_path / "out").err
    shown = cli(tmp_path / "model", "--scheme", "W4A16", "--format", "gguf", "-o", tmp_path / "more")
    assert (shown.code, "--format gguf is for --model-free; leave it out" in shown.err) == (2, True)


def test_weights_stored_as_in_out_have_no_place_in_compressed_tensors(tmp_path):
    with pytest.raises(
        UsageError, match=r"c_attn.weight \[64, 192\] is stored as \[in, out\], for which compressed-ten"
    ):
        run(gpt2(tmp_path / "model"), tmp_path / "out", "compressed-tensors")
    with pytest.raises(UsageError, match=r"GGUF files are written of llama, .*and this is a model of the type gpt2"):
        run(tmp_path / "model", tmp_path / "out", "gguf", group_size=32)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_sources_become_artifacts_one_expert_at_a_time(tmp_path):
    directory = quantized_sources.fp8(tmp_path / "fp8", family="qwen3_moe")
    source, name = open_checkpoint(directory), "model.layers.1.mlp.experts.gate_up_proj"
    stack = source.float_tensor(name)
    assert torch.equal(torch.stack([read_expert(source, name, e, len(stack)) for e in range(len(stack))]), stack)
    run(directory, tmp_path / "out")
    found = quantize.load(tmp_path / "out").get_submodule(name)
    W = RoundToNearest().quantize(stack.flatten(0, 1), found.scheme.weights, None, torch.bfloat16).dequantize()
    assert torch.equal(found.qtensor().dequantize(), W)
    result = run(
        quantized_sources.mxfp4_experts(tmp_path / "mxfp4"), tmp_path / "kept", scheme="MXFP4", group_size=None
    )
    assert result.manifest["kept_grids"] == [
        f"model.layers.{n}.mlp.experts.{part}" for n in (0, 1) for part in ("down_proj", "gate_up_proj")
    ]
    path = quantized_sources.gguf_file(tmp_path / "gguf", ("Q4_0",))
    assert len(run(path, tmp_path / "of-gguf", group_size=32).manifest["kept_grids"]) == 14
    with pytest.raises(
        UsageError, match=r"model.gguf is a GGUF file, whose names only a class .* tells; give --format"
    ):
        run(path, tmp_path / "not", "compressed-tensors")


@pytest.fixture
def with_tokenizer(books, tmp_path):
    directory = small_llama(tmp_path / "model", torch.bfloat16, vocab_size=4128)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(books / name, directory)
    return directory


@torch.no_grad()
def test_a_gguf_file_is_written_and_a_killed_run_goes_on(with_tokenizer, tmp_path, monkeypatch):
    recipe = PLAIN | {"weights": {"symmetric": False}}
    result = run(with_tokenizer, tmp_path / "out", "gguf", group_size=32, recipe=recipe)
    assert result.manifest["types"]["Q4_1"] == 14
    assert result.manifest["parity"]["steps"] < 1e-3
    assert not list((tmp_path / "out").glob("*.safetensors"))
    options = {"gguf_file": "model.gguf", "dtype": torch.float32}
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)
    run(with_tokenizer, tmp_path / "own", group_size=32, recipe=PLAIN | {"weights": {"scale_dtype": "float16"}})
    expected = quantize.load(tmp_path / "own")
    assert relative_error([found(IDS).logits], [expected(IDS).logits]) < 1e-4

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("quantize.export.model_free.gguf.largest_step", killed)
        with pytest.raises(KeyboardInterrupt):
            run(with_tokenizer, tmp_path / "anew", "gguf", group_size=32, recipe=recipe)
    monkeypatch.setattr(files, "write_weight", killed)  # all were rounded
    run(with_tokenizer, tmp_path / "anew", "gguf", group_size=32, recipe=recipe, resume=True)
    assert (tmp_path / "anew" / "model.gguf").read_bytes() == (tmp_path / "out" / "model.gguf").read_bytes()


def test_gguf_for_the_command(with_tokenizer, tmp_path, cli):
    options = ("quantize", "--model-free", "--scheme", "W4A16", "--target", "llama.cpp")
    assert "without the model, as gguf" in cli(*options, with_tokenizer, "--dry-run").out
    done = cli(*options, with_tokenizer, "-o", tmp_path / "out")
    assert done.out.startswith(f"{tmp_path / 'out'}: W4A16 in 14 linears, "), done.err
    shown = cli("verify", tmp_path / "out")
    assert "out was made without the model, as 'gguf'; load it with llama.cpp" in shown.err
