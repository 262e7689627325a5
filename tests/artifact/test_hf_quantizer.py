"""`from_pretrained` of transformers loads artifacts, with outputs equal to those of `quantize.load`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.json_files import change_json
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)

import quantize
from quantize.artifact.registration import register, register_when_imported
from quantize.errors import UsageError
from quantize.graph.export import quiet
from quantize.nn.quantized_experts import QuantizedExperts
from quantize.nn.quantized_linear import QuantizedLinear

TOKENS = torch.tensor([[1, 300, 17, 260, 31, 402, 99, 5], [1, 44, 450, 3, 3, 77, 210, 8]])
RECIPES = {
    "online Hadamard, clipped, asymmetric": ("W4A4", {"quantizer": {"name": "rtn"}}),
    "tables in 8 bits": ("W4A8", {"quantizer": {"name": "rtn"}, "tables": ["embed_tokens"]}),
    "dual rotation": ("W4A4", {"passes": [{"name": "adaptive_rotation"}], "quantizer": {"name": "rtn"}}),
    "noise": ("W6A6", {"passes": [{"name": "noisy_bias"}], "quantizer": {"name": "rtn"}}),
    "runtime smooth": (
        "W4A4",
        {"passes": [{"name": "runtime_smooth"}], "quantizer": {"name": "rtn"}, "activations": {"symmetric": True}},
    ),
    "kv cache": ("W8A8", {"quantizer": {"name": "rtn"}, "kv_cache": {"num_bits": 4}}),
    "prefix": ("W8A8", {"passes": [], "quantizer": {"name": "rtn"}, "prefix": {"tokens": [1, 9]}}),
    "weights alone": ("W4A16", {"passes": [], "quantizer": {"name": "rtn"}}),
    "NF4": ("W4A16", {"passes": [], "quantizer": {"name": "rtn"}, "weights": {"format": "nf4"}}),
    "MXFP4": ("MXFP4", {"quantizer": {"name": "rtn"}, "ignore": ["down_proj", "lm_head"]}),
    "NVFP4": ("NVFP4", {"quantizer": {"name": "rtn"}, "ignore": ["down_proj", "lm_head"]}),
}


def logits(model):
    with quiet(), torch.no_grad():
        return model(TOKENS)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RECIPES)
def test_logits_are_those_of_load(name, dtype, small_run, one_layer):
    scheme, recipe = RECIPES[name]
    groups = {} if scheme not in ("MXFP4", "NVFP4") else {"group_size": None}
    directory = small_run(one_layer, scheme, recipe=recipe, **groups).directory
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    expected = logits(quantize.load(directory, dtype=dtype))
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(quantize.load(directory, dtype=dtype)), expected)  # nothing cached was spoilt
    assert {name for name, x in model.named_buffers() if x.is_meta} == set()


def test_without_a_dtype_transformers_takes_the_float_models(artifact_one_layer, tmp_path):
    """And `load` takes float32, whose figures are the manifest's."""
    shutil.copytree(artifact_one_layer.directory, tmp_path / "out")
    change_json(tmp_path / "out" / "config.json", dtype="bfloat16")
    with quiet():
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert quantize.load(artifact_one_layer.directory).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", [AutoModelForCausalLM, AutoModel])
def test_a_mixture_loads_with_its_experts(cls, dtype, artifact_mixture):
    directory, ids = artifact_mixture.directory, TOKENS % 64
    with quiet(), torch.no_grad():
        model, expected = cls.from_pretrained(directory, dtype=dtype), quantize.load(directory, dtype=dtype)
        expected = expected if cls is AutoModelForCausalLM else expected.base_model
        assert torch.equal(model(ids)[0], expected(ids)[0])
        assert isinstance(model.base_model.layers[0].mlp.experts.down_proj, QuantizedExperts)
        if cls is AutoModelForCausalLM:
            texts = [m.generate(ids, max_new_tokens=4, do_sample=False) for m in (model, expected)]
            assert torch.equal(*texts)


def test_from_pretrained_generates_and_takes_a_device_map(artifact_one_layer):
    directory = artifact_one_layer.directory
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, device_map="cpu")
        tokens = model.generate(TOKENS, max_new_tokens=4, do_sample=False)
        assert torch.equal(tokens, quantize.load(directory).generate(TOKENS, max_new_tokens=4, do_sample=False))
        split = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
        with pytest.raises(UsageError, match="cannot stay on the disk"):
            AutoModelForCausalLM.from_pretrained(directory, device_map=split)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        text = pipeline("text-generation", model=model, tokenizer=tokenizer)("Once upon", max_new_tokens=3)
    assert text[0]["generated_text"].startswith("Once upon")


def test_the_body_of_a_model_loads_without_its_head(artifact_one_layer):
    with quiet(), torch.no_grad():
        body = AutoModel.from_pretrained(artifact_one_layer.directory, dtype=torch.float32)
        expected = quantize.load(artifact_one_layer.directory).model(TOKENS)[0]
        assert torch.equal(body(TOKENS)[0], expected)
    assert sum(isinstance(module, QuantizedLinear) for module in body.modules()) == 7


def test_an_encoder_loads_with_and_without_a_head(small_run, minilm, tmp_path):
    shutil.copytree(minilm, tmp_path / "model")
    change_json(tmp_path / "model" / "config.json", num_hidden_layers=1)
    artifact = small_run(tmp_path / "model", "W8A8", calibration=None, recipe={"quantizer": {"name": "rtn"}})
    with quiet(), torch.no_grad():
        model = AutoModel.from_pretrained(artifact.directory, dtype=torch.float32)
        expected = quantize.load(artifact.directory)(TOKENS)
        assert torch.equal(model(TOKENS)[0], expected[0])
        headed = AutoModelForTokenClassification.from_pretrained(artifact.directory, dtype=torch.float32)
        assert torch.equal(headed.base_model(TOKENS)[0], expected[0])
        with pytest.raises(UsageError, match="in 8 bits, and BertForMaskedLM ties its head to it; load it without"):
            AutoModelForMaskedLM.from_pretrained(artifact.directory)


@pytest.mark.slow
def test_sentence_transformers_load_an_encoder_with_all_its_parts(small_run, minilm, tmp_path):
    """What lies in folders belongs to a model as well, such as `1_Pooling/config.json`."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    shutil.copytree(minilm, tmp_path / "model")
    change_json(tmp_path / "model" / "config.json", num_hidden_layers=1)
    artifact = small_run(tmp_path / "model", "W8A8", calibration=None, recipe={"quantizer": {"name": "rtn"}})
    with quiet(), torch.no_grad():
        model = sentence_transformers.SentenceTransformer(str(artifact.directory), device="cpu")
        found = torch.from_numpy(model.encode(["A man is playing a guitar."]))
        tokens = model.tokenizer(["A man is playing a guitar."], return_tensors="pt")
        expected = quantize.load(artifact.directory)(**tokens)[0].mean(1)
        with pytest.raises(UsageError, match=f"give save_pretrained a new directory, or copy {artifact.directory}"):
            model.save(str(tmp_path / "again"))
    assert isinstance(model[0].auto_model.encoder.layer[0].attention.self.query, QuantizedLinear)
    assert torch.allclose(found, torch.nn.functional.normalize(expected), atol=1e-5)


@pytest.mark.parametrize("load", ["quantize", "transformers"])
def test_save_pretrained_writes_the_artifact_again(load, artifact_one_layer, tmp_path, tree):
    directory = artifact_one_layer.directory
    with quiet():
        model = (
            quantize.load(directory)
            if load == "quantize"
            else AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        )
        model.save_pretrained(tmp_path / "again")
    assert tree(tmp_path / "again") == tree(directory)
    with pytest.raises(UsageError, match="again is not empty; give save_pretrained a new directory"):
        model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        model.model.norm.weight += 1
    with pytest.raises(UsageError, match=r"model\.norm\.weight is not what .* holds, and a changed model"):
        model.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed").exists()


def test_settings_are_checked_before_anything_is_built(artifact_one_layer, tmp_path):
    shutil.copytree(artifact_one_layer.directory, tmp_path / "wrong")
    config = json.loads((tmp_path / "wrong" / "config.json").read_text())
    config["quantization_config"]["scheme"]["weights"]["num_bits"] = 5
    change_json(tmp_path / "wrong" / "config.json", **config)
    with pytest.raises(UsageError, match="num_bits"), quiet():
        AutoModelForCausalLM.from_pretrained(tmp_path / "wrong")


def test_registering_twice_changes_nothing():
    register()
    register_when_imported()


@pytest.mark.parametrize("order", ["import quantize, transformers", "import transformers, quantize"])
def test_importing_the_package_is_enough_and_fast(order, artifact_one_layer):
    """In a process of its own, in which transformers is imported before and after."""
    source = f"""
import sys
{order}
assert "torch" not in sys.modules, "the import was slow"
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.model.layers[0].mlp.up_proj).__name__ == "QuantizedLinear"
"""
    arguments = [sys.executable, "-c", source, str(artifact_one_layer.directory)]
    run = subprocess.run(arguments, capture_output=True, text=True, cwd=Path(quantize.__file__).parents[1])
    assert run.returncode == 0, run.stderr
