"""GGUF files of tiny models of each architecture: what transformers loads computes what the artifact computes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from quantize.artifact.load import load
from quantize.errors import QuantizeError
from quantize.eval.report import evaluate
from quantize.export.comparison import relative_error
from quantize.export.directory import export_artifact
from quantize.export.gguf import parity as parity_module
from quantize.export.gguf import tensors
from quantize.graph.export import quiet

FILE = {"gguf_file": "model.gguf", "dtype": torch.float32}
COMMON = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 4128, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": None,
}  # fmt: skip
HEADS = {"head_dim": 32}  # so that heads are wider than the residual stream
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
MODELS = {
    "llama": HEADS,
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
    "gemma3_text": {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 8, "num_hidden_layers": 6},
}  # transformers knows no other width of heads of the last two
RTN = {"quantizer": {"name": "rtn"}}
pytestmark = pytest.mark.slow


@pytest.fixture
def model(books, tmp_path):
    """Return a function that makes a directory with a random model of a type, and the tokenizer of books-llama."""

    def make(kind, dtype=torch.float32, **changes):
        torch.manual_seed(0)
        config = transformers.CONFIG_MAPPING[kind](**{**COMMON, **MODELS[kind], **changes})
        found = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in found.parameters():
                parameter.normal_(0, 0.3, generator=generator)
        found.to(dtype).save_pretrained(tmp_path / "model")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(books / name, tmp_path / "model")
        return tmp_path / "model"

    return make


def exported(artifact, tmp_path):
    parity = export_artifact(artifact.directory, "gguf", tmp_path / "gguf")
    return tmp_path / "gguf", parity


def in_transformers(directory):
    with quiet():
        return AutoModelForCausalLM.from_pretrained(directory, **FILE).eval()


@pytest.mark.parametrize(
    ("kind", "dtype", "recipe"),
    [
        ("llama", torch.bfloat16, {"passes": [{"name": "fold_norms"}, {"name": "rotate", "online_hadamard": False}]}),
        ("qwen2", torch.float32, {"weights": {"symmetric": False}}),
        ("qwen3", torch.bfloat16, {"weights": {"group_size": 64}}),
        ("gemma3_text", torch.float32, {"tables": []}),
        ("llama", torch.float32, {"weights": {"format": "iq4_nl"}}),
    ],
)
def test_transformers_computes_what_the_artifact_does(kind, dtype, recipe, model, small_run, tmp_path, books_heldout):
    artifact = small_run(
        model(kind, dtype), "W4A16", target="llama.cpp", recipe={**RTN, **recipe}, group_size=None,
        calibration=books_heldout,
    )  # fmt: skip
    directory, parity = exported(artifact, tmp_path)
    assert (parity["steps"], parity["activations"]) == (0, 0)
    found, own = in_transformers(directory), load(artifact.directory)
    ids = torch.randint(4096, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative_error([found(ids).logits], [own(ids).logits]) < 2**-17
        greedy = [x.generate(ids[:1], max_new_tokens=12, do_sample=False) for x in (found, own)]
    assert torch.equal(*greedy)
    few = {"text": books_heldout, "nsamples": 1, "seqlen": 16}
    losses = [evaluate(place, **few)["loss"] for place in (directory, directory / "model.gguf", artifact.directory)]
    assert losses == pytest.approx([losses[-1]] * 3, rel=1e-3)  # the file is read in the dtype of the config


def test_biases_rotary_embeddings_of_llama3_and_what_is_noticed(model, small_run, tmp_path, monkeypatch, books_heldout):
    """Of a GGUF file transformers reads neither, but it computes them with the artifact's config."""
    directory = model("llama", attention_bias=True, rope_parameters=LLAMA3, num_hidden_layers=1)
    artifact = small_run(
        directory, "W8A8", target="llama.cpp", recipe={**RTN, "passes": []}, group_size=None, calibration=books_heldout
    )
    _, parity = exported(artifact, tmp_path)
    assert parity["steps"] == 0
    assert parity["activations"] > 1e-4
    assert {x.name for x in GGUFReader(tmp_path / "gguf" / "model.gguf").tensors} >= {
        "blk.0.attn_q.bias",
        "rope_freqs.weight",
    }
    manifest = json.loads((tmp_path / "gguf" / "manifest.json").read_text())
    assert (manifest["types"], manifest["format"]) == ({"F32": 8, "Q8_0": 9}, "gguf")
    for module in (tensors, parity_module):
        monkeypatch.setattr(module, "row_order", lambda path, count, config: None)
    with pytest.raises(QuantizeError, match="transformers differs from the artifact by"):
        export_artifact(artifact.directory, "gguf", tmp_path / "wrong")
    monkeypatch.setattr(parity_module, "moved", lambda weight, own: 0.2)
    with pytest.raises(QuantizeError, match=r"the file's weights are 0\.2 steps from the artifact's.*scale_dtype"):
        export_artifact(artifact.directory, "gguf", tmp_path / "moved")
    assert not (tmp_path / "wrong").exists() | (tmp_path / "moved").exists()
