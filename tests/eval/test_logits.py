"""Scores of models with large vocabularies, whose logits are made a few tokens at a time."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    BartConfig,
    BartForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from quantize import load
from quantize.eval import logits as chunked
from quantize.eval.logits import logits_in_chunks
from quantize.eval.perplexity import score_language

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
GEMMA = {**SIZES, "vocab_size": 97, "head_dim": 8, "num_key_value_heads": 1, "final_logit_softcapping": 0.1}
BART = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "vocab_size": 97}
MODELS = {
    "softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**GEMMA)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=97)),
    "no body": lambda: BartForCausalLM(BartConfig(**BART)),
}
IDS = torch.randint(97, (3, 20), generator=torch.Generator().manual_seed(0))


def made(name, seed=0):
    torch.manual_seed(seed)
    return MODELS[name]().eval()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_chunks_are_the_logits_of_the_model(name):
    model, forward = made(name), made(name).base_model.forward.__func__
    whole = model(input_ids=IDS).logits[:, :-1]
    chunks = list(logits_in_chunks(model, IDS, 7))
    assert [chunk.shape[1] for chunk in chunks] == [7, 7, 5]
    torch.testing.assert_close(torch.cat(chunks, 1), whole)
    assert model.base_model.forward.__func__ is forward
    torch.testing.assert_close(model(input_ids=IDS).logits[:, :-1], whole)


@torch.no_grad()
def test_scores_are_those_of_all_logits(monkeypatch):
    model, other = made("gpt2"), made("gpt2", seed=1)
    monkeypatch.setattr(chunked, "LOGIT_BYTES", 4 * 3 * 97 * 6)
    found = score_language(model, [IDS, IDS[:1] // 2], other)
    q, p = (
        torch.cat([m(input_ids=ids).logits[:, :-1].reshape(-1, 97) for ids in (IDS, IDS[:1] // 2)])
        for m in (model, other)
    )
    labels = torch.cat([IDS[:, 1:].flatten(), (IDS[:1] // 2)[0, 1:]])
    assert found.tokens == len(labels) == 76
    assert found.loss == pytest.approx(float(cross_entropy(q, labels)))
    assert found.loss_against == pytest.approx(float(cross_entropy(p, labels)))
    kl = kl_div(log_softmax(q, -1), log_softmax(p, -1), reduction="batchmean", log_target=True)
    assert found.kl == pytest.approx(float(kl))
    assert found.top1 == pytest.approx(float((q.argmax(-1) == p.argmax(-1)).float().mean()))


class Largest(TorchDispatchMode):
    """Records the bytes of the largest tensor that an operator returns."""

    found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        sizes = [t.numel() * t.element_size() for t in tree_leaves(output) if isinstance(t, torch.Tensor)]
        self.found = max(self.found, *sizes, 0)
        return output


def test_a_large_vocabulary_does_not_fill_the_memory(monkeypatch):
    """All logits take 4 · 2 · 63 · 30,000 bytes, sixteen times the bound; the head's weight is smaller than it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "hidden_size": 8}, vocab_size=30_000)).eval()
    monkeypatch.setattr(chunked, "LOGIT_BYTES", 1 << 20)
    with Largest() as largest:
        score_language(model, [torch.arange(128).view(2, 64)], model)
    assert 1 << 19 < largest.found <= 1 << 20


@pytest.mark.parametrize("ignore", [[], ["lm_head"]])
def test_a_prefix_stands_in_front_of_the_body_alone(small_run, ignore):
    """Also where the head is quantized, which asks whether its rows are the prefix."""
    recipe = {"passes": [], "quantizer": {"name": "rtn"}, "ignore": ignore, "prefix": {"tokens": [3, 4]}}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=512, tie_word_embeddings=False))
    loaded = load(small_run(model, "W8A8", recipe=recipe).directory)
    with torch.no_grad():
        whole = loaded(input_ids=IDS).logits[:, :-1]
        torch.testing.assert_close(torch.cat(list(logits_in_chunks(loaded, IDS, 7)), 1), whole)
        torch.testing.assert_close(loaded(input_ids=IDS).logits[:, :-1], whole)
