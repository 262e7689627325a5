"""Modules in memory: of transformers, and written by hand without any config."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from quantize import load
from quantize.errors import QuantizeError, UsageError
from quantize.nn.quantized_embedding import QuantizedEmbedding
from quantize.nn.quantized_linear import QuantizedLinear

TOKENS = torch.arange(40).reshape(2, 20)
RTN = {"passes": [], "quantizer": {"name": "rtn"}}


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 3 * dim), nn.Linear(3 * dim, dim)

    def forward(self, x):
        fused = self.qkv(self.before_attention(x)).unflatten(-1, (3, 2, -1)).transpose(1, 3)
        mixed = functional.scaled_dot_product_attention(*fused.unbind(2), is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.before_mlp(x))))


class HandWritten(nn.Module):
    def __init__(self, tied=False, positions=64, config=None, shift=0.0):
        super().__init__()
        self.embed, self.position = nn.Embedding(512, 16), nn.Embedding(positions, 16)
        self.blocks = nn.ModuleList([Block(16)])
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 512, bias=False)
        self.register_buffer("shift", shift * torch.linspace(-1, 1, 16))
        if tied:
            self.head.weight = self.embed.weight
        if config is not None:
            self.config = config

    def forward(self, tokens):
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embed(tokens) + self.position(places) + self.shift
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@pytest.fixture
def module():
    """Build a hand-written module from a seed; a function."""

    def build(seed=0, **arguments):
        torch.manual_seed(seed)
        return HandWritten(**arguments)

    return build


@torch.no_grad()
def distance(a, b):
    return float((a(TOKENS) - b(TOKENS)).abs().max() / b(TOKENS).abs().max())


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.slow
def test_a_transformers_module_loads_back_and_generates(small_run):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_hidden_layers=1, max_position_embeddings=64, **sizes))
    before = state(model)
    artifact = small_run(model)
    assert model.training
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    loaded = load(artifact.directory)
    assert type(loaded) is LlamaForCausalLM
    assert sum(isinstance(layer, QuantizedLinear) for layer in loaded.modules()) == 8
    assert loaded.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (2, 23)
    with torch.no_grad():
        found, expected = loaded(TOKENS).logits, model.eval()(TOKENS).logits
    assert 0 < float((found - expected).abs().max() / expected.abs().max()) < 0.2


def test_a_hand_written_module_loads_into_a_fresh_one(small_run, module):
    model, fresh = module(shift=2.0), module(seed=1)
    assert distance(fresh, model) > 0.5
    artifact = small_run(model, "W8A8")
    loaded = load(artifact.directory, skeleton=fresh)
    assert type(loaded.blocks[0].qkv) is QuantizedLinear
    assert loaded.head.scheme.label == "W8A16"  # it scores the vocabulary, as `embed` holds it, and they are not tied
    assert type(loaded.embed) is QuantizedEmbedding
    assert {artifact.manifest["coverage"][f"{path}.weight"] for path in ("head", "embed")} == {"quantized"}
    assert distance(loaded, model) < 0.05
    assert not (artifact.directory / "config.json").exists()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert artifact.manifest["coverage"].keys() == parameters.keys()


@pytest.mark.parametrize("recipe", [RTN, {"passes": [{"name": "smoothquant"}]}])
def test_tied_weights_reach_both_places_in_a_fresh_module(small_run, module, recipe):
    model = module(tied=True)
    artifact = small_run(model, "W8A8", recipe={**recipe, "ignore": ["head"]})
    index = json.loads((artifact.directory / "model.safetensors.index.json").read_text())["weight_map"]
    loaded = load(artifact.directory, skeleton=module(seed=1, tied=True))
    assert distance(loaded, model) < 0.05
    if not artifact.manifest["untied"]:
        assert len({"embed.weight", "head.weight"} & index.keys()) == 1
        assert loaded.head.weight is loaded.embed.weight


def test_a_module_that_does_not_fit_is_refused(small_run, module):
    artifact = small_run(module(), "W8A8", recipe=RTN)
    with pytest.raises(QuantizeError, match="does not fit"):
        load(artifact.directory, skeleton=nn.Sequential(nn.Embedding(512, 16), nn.Linear(16, 512)))
    deeper = module()
    deeper.blocks.append(Block(16))
    with pytest.raises(QuantizeError, match=r"blocks\.1"):
        load(artifact.directory, skeleton=deeper)


@pytest.mark.parametrize("config", [SimpleNamespace(dim=16), {"dim": 16}])
def test_a_module_may_have_a_config_of_its_own_kind(small_run, module, config):
    model = module(config=config)
    artifact = small_run(model, "W8A8", recipe=RTN)
    assert distance(load(artifact.directory, skeleton=copy.deepcopy(model)), model) < 0.05


def test_text_longer_than_the_positions_of_a_module_is_one_sentence(small_run, module, tmp_path):
    with pytest.raises(QuantizeError, match="position"):
        small_run(module(positions=8), "W8A8")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(small_run, module, tmp_path, value):
    model = module()
    with torch.no_grad():
        model.blocks[0].up.weight[3, 4] = value
    with pytest.raises(QuantizeError, match=rf"blocks\.0\.up\.weight holds {value} at \[3, 4\]"):
        small_run(model)
    assert not list(tmp_path.iterdir())


def test_a_module_with_a_tokenizer_is_calibrated_on_text_and_loads_back(small_run, stories, module):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    texts = [f"Once upon a time there were {n} dogs in the big park." for n in range(9)]
    model = module()
    artifact = small_run(model, "W8A8", calibration=texts, tokenizer=tokenizer)
    loaded = artifact.load()
    assert type(loaded.blocks[0].qkv) is QuantizedLinear
    assert type(model.blocks[0].qkv) is nn.Linear
    assert distance(loaded, model) < 0.05
    assert AutoTokenizer.from_pretrained(artifact.directory)(texts[0]) == tokenizer(texts[0])
    with pytest.raises(UsageError, match="a module that transformers does not know; give a module of its class as"):
        load(artifact.directory)


def test_a_module_needs_ids_and_says_so(small_run, module):
    with pytest.raises(QuantizeError, match=r"the model has no tokenizer; give a \.jsonl"):
        small_run(module(), calibration=None)
