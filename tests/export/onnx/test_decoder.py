"""Causal language models in ONNX Runtime with keys and values in and out: six families, any batch, any past."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.exporting import SYMMETRIC_8, quantized, run_onnx, scheme, tiny
from transformers import FalconConfig, FalconForCausalLM, MistralConfig, MistralForCausalLM

from benchmarks.families.families import FAMILIES as ALL_FAMILIES
from quantize.errors import QuantizeError, UsageError
from quantize.export.onnx.decoder import SHAPES, Decoder
from quantize.export.onnx.encoder_decoder_parts import is_seq2seq
from quantize.export.onnx.export import export_onnx, interface_of
from quantize.export.onnx.parity import run_torch

FAMILIES = ["llama", "qwen3", "neox", "opt", "gpt2", "phi3"]


def left_padded(interface, batch, length, past):
    """Samples of all lengths, as a tokenizer pads them for generation: zeros of the mask in front."""
    feed = interface.feed(batch, length, past, seed=3)
    mask = feed["attention_mask"]
    mask[:] = torch.arange(past + length) >= torch.arange(batch)[:, None]
    feed["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
    return feed


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_decodes_with_a_cache(family, tmp_path):
    model = quantized(tiny(family), scheme(4, group_size=16))
    differences = export_onnx(model, tmp_path)
    assert differences["activations"] == 0
    assert max(differences.values()) < 1e-5

    interface = interface_of(model)
    assert isinstance(interface, Decoder)
    for shape in [(2, 6, 0), (3, 1, 4), (3, 4, 3), (1, 1, 0)]:
        feed = left_padded(interface, *shape)
        attended = feed["attention_mask"].bool().numpy()
        (found,), (expected,) = run_onnx(tmp_path / "model.onnx", [feed]), run_torch(interface, [feed])
        tokens = attended[:, -shape[1] :]
        np.testing.assert_allclose(found[0][tokens], expected[0][tokens], atol=1e-5)
        for x, y in zip(found[1:], expected[1:], strict=True):  # [batch, heads, tokens, head_dim]
            np.testing.assert_allclose(x.swapaxes(1, 2)[attended], y.swapaxes(1, 2)[attended], atol=1e-5)


@pytest.mark.slow
def test_one_head_of_keys_serves_all_heads_of_queries(tmp_path):
    """Falcon gives one head of keys to torch's attention, which repeats it; ONNX's operator does not."""
    torch.manual_seed(0)
    config = FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, multi_query=True)
    model = quantized(FalconForCausalLM(config).eval(), scheme(4, group_size=16))
    assert max(export_onnx(model, tmp_path).values()) < 1e-5


@pytest.mark.slow
def test_the_cache_makes_up_for_the_tokens_before(tmp_path):
    """What the whole text gives at once, it gives token by token; from weights that lie beside the file."""
    model = quantized(tiny("llama", layers=2), scheme(4))
    export_onnx(model, tmp_path, large=0)
    config = json.loads((tmp_path / "ort_config.json").read_text())
    assert config["precisions"] == {"4-bit weights, float32 activations": 14, "float32": 1}
    assert (tmp_path / "model.onnx.data").stat().st_size > 25_000  # 19,616 weights, most of them in nibbles
    assert str(Path(__file__).parents[3]).encode() not in (tmp_path / "model.onnx").read_bytes()
    interface, path = interface_of(model), tmp_path / "model.onnx"
    feed = interface.feed(2, 6, 0, seed=5)
    feed["attention_mask"][:] = 1
    feed["position_ids"] = torch.arange(6).expand(2, -1).contiguous()
    whole, past = run_onnx(path, [feed])[0], {name: feed[name] for name in interface.past}
    for t in range(6):
        one = {"input_ids": feed["input_ids"][:, t : t + 1], "attention_mask": feed["attention_mask"][:, : t + 1]}
        one["position_ids"] = torch.full((2, 1), t)
        logits, *present = run_onnx(path, [one | past])[0]
        past = dict(zip(interface.past, map(torch.from_numpy, present), strict=True))
        np.testing.assert_allclose(logits[:, 0], whole[0][:, t], atol=1e-5)


def test_the_shapes_that_are_compared_are_those_of_use():
    interface = interface_of(tiny("llama"))
    for (batch, length, past), feed in zip(SHAPES.values(), interface.feeds(1).values(), strict=True):
        assert feed["input_ids"].shape == (batch, length)
        assert feed["past_key_values.0.value"].shape == (batch, 2, past, 8)
    again, other = interface.feeds(1)["prefill"], interface.feeds(2)["prefill"]
    assert torch.equal(again["input_ids"], interface.feeds(1)["prefill"]["input_ids"])
    assert not torch.equal(again["input_ids"], other["input_ids"])


@pytest.mark.slow
def test_a_cache_that_is_read_wrongly_is_noticed(tmp_path, monkeypatch):
    """Traced with keys and values exchanged, the file is not what torch computes."""
    forward, seen = Decoder.forward, []

    def exchanged(self, feed):
        seen.append(torch.onnx.is_in_onnx_export())
        return forward(self, {**feed, self.past[0]: feed[self.past[1]]} if seen[-1] else feed)

    monkeypatch.setattr(Decoder, "forward", exchanged)
    with pytest.raises(QuantizeError, match=r"ONNX Runtime differs from torch by .* and rounding explains at most"):
        export_onnx(quantized(tiny("llama"), scheme(4, SYMMETRIC_8)), tmp_path)
    assert any(seen)


@pytest.mark.parametrize("name", ["mamba", "falcon_h1"])  # a state alone, and one beside keys and values
def test_a_state_that_is_no_keys_and_values_is_refused(name, tmp_path):
    with pytest.raises(UsageError, match=r"keeps more of earlier tokens than keys and values, .* with quantize.load"):
        export_onnx(ALL_FAMILIES[name].build(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_sliding_window_is_no_state():
    """Its layer of the cache holds the window's length as a tensor."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MistralConfig(**sizes, num_key_value_heads=2, intermediate_size=64, sliding_window=16)
    assert isinstance(interface_of(MistralForCausalLM(config)), Decoder)


def test_a_model_whose_encoder_refuses_a_cache_is_taken_in_one_pass():
    assert not is_seq2seq(ALL_FAMILIES["switch_transformers"].build())
