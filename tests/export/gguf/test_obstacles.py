"""What a GGUF file cannot hold is refused by name before a run, with what to change."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from quantize.export.gguf import architectures, obstacles
from quantize.export.gguf.architectures import ARCHITECTURES, rope_factors
from quantize.export.outline import Outline
from quantize.scheme.scheme import ActivationArgs, Scheme, WeightArgs

SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 128, "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
UP = "model.layers.0.mlp.up_proj"
OWN = {"gemma3_text": {"query_pre_attn_scalar": 16}}


def outline(directory, kind="llama", scheme=None, columns=64, **settings):
    changes = settings.pop("config", {})
    config = transformers.CONFIG_MAPPING[kind](**{**SMALL, **OWN.get(kind, {}), **changes})
    with torch.device("meta"):
        skeleton = transformers.AutoModelForCausalLM.from_config(config)
    scheme = scheme or Scheme(weights=WeightArgs(num_bits=4, group_size=32))
    modules = {UP: {"columns": columns, **settings.pop("entry", {})}}
    settings = {"scheme": scheme.model_dump(), "modules": modules, "tables": [], **settings}
    return Outline(config.to_dict(), settings, skeleton, directory)


def found(*arguments, **more):
    return [str(obstacle) for obstacle in obstacles.obstacles(outline(*arguments, **more))]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_models_of_the_known_types_are_written(kind, books):
    eight = Scheme(weights=WeightArgs(num_bits=8), activations=ActivationArgs(num_bits=8))
    assert found(books, kind) == found(books, kind, eight, tables=["model.embed_tokens"]) == []


def test_weights_of_3_bits_have_no_blocks(books):
    for symmetric in (True, False):
        three = Scheme(weights=WeightArgs(num_bits=3, symmetric=symmetric, group_size=32))
        assert found(books, scheme=three) == ["GGUF has no place for 3-bit weights; quantize with --scheme W4A16"]


@pytest.mark.parametrize(
    ("kind", "config", "words"),
    [
        ("llama", {"hidden_act": "gelu"}, "llama.cpp computes silu in llama models, and this has gelu; run the"),
        ("llama", {"rope_parameters": YARN}, "rotary embeddings of the type yarn have no place in a GGUF file of"),
        ("qwen2", {"rope_parameters": LLAMA3}, "rotary embeddings of the type llama3 have no place in a GGUF file"),
        ("qwen2", {"head_dim": 32}, "llama.cpp reads qwen2 models whose heads are as wide as the residual stream"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}, "llama.cpp lets all layers of qwen2 models"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 6}, "llama.cpp lets each 6th layer of gemma3 models"),
        ("gemma3_text", {"query_pre_attn_scalar": 32}, "llama.cpp divides scores of gemma3 models by the root of 16"),
        ("gemma3_text", {"attn_logit_softcapping": 30.0}, "gemma3 models attend forwards and without a cap"),
    ],
)
def test_what_llama_cpp_computes_otherwise(kind, config, words, books):
    assert any(words in line for line in found(books, kind, config=config)), found(books, kind, config=config)


HADAMARD = {"online": [{"kind": "hadamard"}]}
SHIFT = {"online": [{"kind": "shift"}]}


@pytest.mark.parametrize(
    ("scheme", "settings", "words"),
    [
        ({"num_bits": 4, "group_size": 16}, {}, "groups of 16 columns; quantize with --group-size 32 or a multiple"),
        ({"num_bits": 4}, {"columns": 80}, f"the 80 columns of {UP}, as blocks have 32; quantize with --ignore {UP}"),
        ({"num_bits": 4, "format": "nvfp4", "group_size": 16}, {"columns": 96}, "the 96 columns of .* blocks have 64"),
        ({"num_bits": 8, "symmetric": False}, {}, "8-bit weights with zero points; quantize with `symmetric = true`"),
        ({"num_bits": 4, "format": "nf4", "group_size": 64}, {}, r'nf4 weights; quantize with `format = "int"`'),
        ({"num_bits": 4}, {"entry": HADAMARD}, "a rotation of activations; quantize with `online_hadamard = false`"),
        ({"num_bits": 4}, {"entry": SHIFT}, "a bias on what is rounded; quantize with no pass `noisy_bias`"),
        ({"num_bits": 4}, {"prefix": [1]}, "a prefix of tokens; quantize with no `prefix`"),
        ({"num_bits": 4}, {"kv_cache": {"num_bits": 4}}, "how keys and values are quantized; quantize with no table"),
        ({"num_bits": 4}, {"tables": ["model.embed_tokens"], "config": {"hidden_size": 48}}, "the 48 columns of model"),
    ],
)
def test_what_a_file_has_no_place_for(scheme, settings, words, books):
    (line,) = found(books, scheme=Scheme(weights=WeightArgs(**scheme)), **settings)
    assert re.search(f"GGUF has no place for {words}", line), line


def test_models_of_other_types_and_no_package(books, monkeypatch):
    config = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    (line,) = obstacles.obstacles(Outline({"model_type": "opt", **config}, {}, torch.nn.Module(), books))
    assert str(line).startswith(
        "GGUF files are written of llama, qwen2, qwen3, gemma3_text, and this is a model of the"
    )
    monkeypatch.setattr(obstacles, "find_spec", lambda name: None)
    assert found(books) == ["the package gguf writes the file and is not installed; pip install 'quantize-model[gguf]'"]


def test_rotary_frequencies_of_llama3_are_those_of_transformers():
    config = transformers.LlamaConfig(**{**SMALL, "head_dim": 64, "rope_parameters": LLAMA3})
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 10000 ** (torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(plain / rope_factors(config.to_dict()), expected)
    assert rope_factors(transformers.LlamaConfig(**SMALL).to_dict()) is None
    assert architectures.rope(config.to_dict())["rope_type"] == "llama3"
