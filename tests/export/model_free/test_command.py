"""The command `quantize --model-free`: what it prints, and which options it takes."""

import json

import pytest
import torch
from helpers.quantized_sources import small_llama
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from quantize.artifact.load import load
from quantize.export.comparison import relative_error
from quantize.graph.export import quiet

MODEL_FREE = ("quantize", "--model-free", "--scheme", "W4A16", "--group-size", "32")


def test_a_dry_run_and_a_run(cli, tmp_path):
    model, out = small_llama(tmp_path / "model"), tmp_path / "out"
    planned = cli(*MODEL_FREE, model, "--dry-run")
    assert planned.out.startswith("14 linears to W4A16, in 1 files, rounded by rtn without the model, as compressed-te")
    assert "3 weights stay in floating point: outside of all numbered layers" in planned.out
    foreseen = int(planned.out.split("artifact: ")[1].split(" bytes")[0].replace(",", ""))
    done = cli(*MODEL_FREE, model, "-o", out, "--target", "vllm")
    assert done.out.startswith(f"{out}: W4A16 in 14 linears, ")
    assert "to serve it: vllm serve" in done.err.replace("\n", " ")
    header = 8 + int.from_bytes((out / "model.safetensors").read_bytes()[:8], "little")
    assert (out / "model.safetensors").stat().st_size == foreseen + header


@pytest.mark.parametrize(
    ("scheme", "loading", "most"),
    [
        ("W3A16", CompressedTensorsConfig(dequantize=True), 1e-5),
        ("W6A6", None, 0.2),
    ],  # inputs have other steps there, and this model is random
)
def test_what_vllm_does_not_execute_is_for_transformers(cli, tmp_path, scheme, loading, most):
    model, out = small_llama(tmp_path / "model"), tmp_path / "out"
    options = ("quantize", "--model-free", "--scheme", scheme, "--group-size", "32", model, "-o", out)
    refused = cli(*options, "--target", "vllm")
    assert (refused.code, f"vllm cannot execute {scheme}: it has no product" in refused.err) == (2, True)
    done = cli(*options, "--target", "transformers")
    assert "vLLM does not serve it: it has no product" in done.err
    assert ("transformers loads it with CompressedTensorsConfig(dequantize=True) alone" in done.err) == bool(loading)
    there = {} if loading is None else {"quantization_config": loading}
    assert cli(*options[:-1], tmp_path / "artifact", "--format", "artifact").code == 0
    with quiet(), torch.no_grad():
        models = AutoModelForCausalLM.from_pretrained(out, **there), load(tmp_path / "artifact")
        found, expected = (model(torch.arange(3, 35)[None]).logits for model in models)
    assert relative_error([found], [expected]) < most


def test_progress_for_programs(cli, tmp_path):
    done = cli(*MODEL_FREE, small_llama(tmp_path / "model"), "-o", tmp_path / "out", "--progress", "json")
    *_, last = map(json.loads, done.out.splitlines())
    assert (last["event"], last["schemes"]) == ("done", {"W4A16": 14})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--nsamples", "4"], "--nsamples needs the model; leave it or --model-free out"),
        (["--device", "cuda"], "--device needs the model; leave it or --model-free out"),
        (["--target", "llama.cpp", "--format", "artifact"], "writes artifact, which llama.cpp does not read; leave"),
        (["--target", "onnxruntime"], "writes compressed-tensors, artifact and gguf, which onnxruntime does not read"),
    ],
)
def test_options_that_need_the_model(cli, tmp_path, options, words):
    found = cli(*MODEL_FREE, small_llama(tmp_path / "model"), "-o", tmp_path / "out", *options)
    assert (found.code, words in found.err) == (2, True)
