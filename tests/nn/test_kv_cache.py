"""A quantized KV cache: rounding by head, rotated queries and keys, the artifact, and what is refused."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from quantize import load, quantize_model
from quantize.artifact.verify import verify_artifact
from quantize.calibration.data import read_samples
from quantize.checkpoint.opening import open_checkpoint
from quantize.checkpoint.tokenizer import load_tokenize
from quantize.errors import QuantizeError, UsageError
from quantize.eval.perplexity import score_language
from quantize.eval.planted_outliers import plant_keys
from quantize.export.directory import export_artifact
from quantize.export.onnx.export import export_onnx
from quantize.nn import kv_cache
from quantize.nn.attention import set_kv_cache
from quantize.nn.kv_cache import quantize_heads, rotate_heads
from quantize.recipe.recipe import load_recipe
from quantize.scheme.scheme import KVCacheArgs

RTN = {"passes": [], "quantizer": {"name": "rtn"}}
KV4 = {"kv_cache": {"num_bits": 4}}


def args(**settings):
    return KVCacheArgs(**{"num_bits": 4, "hadamard": False, **settings})


@pytest.fixture(scope="module")
def artifact(stories, stories_calibration, tmp_path_factory):
    """All of stories260K with 4-bit weights and cache; its activations are left, whose rounding magnifies noise."""
    return quantize_model(
        stories, scheme="W4A16", output_dir=tmp_path_factory.mktemp("kv") / "out", calibration=stories_calibration,
        recipe={**RTN, **KV4}, group_size=0, nsamples=2, seqlen=16,
    )  # fmt: skip


def test_each_head_of_each_token_has_a_grid_of_its_own():
    key = torch.tensor([[[[0, 7, 15, 4.4]], [[-0.3, 0, 1.2, 0.26]]]])  # [1, 2 heads, 1 token, 4]: steps 1 and 0.1
    value = torch.tensor([[[[-7, 8, 0, 0.6]], [[0, 30, 2.9, 3.1]]]])  # steps 1 and 2
    query, k, v = quantize_heads(key + 1, key, value, args())
    assert torch.equal(query, key + 1)
    assert torch.allclose(k, torch.tensor([[[[0, 7, 15, 4]], [[-0.3, 0, 1.2, 0.3]]]]), atol=1e-6)
    assert torch.allclose(v, torch.tensor([[[[-7.0, 8, 0, 1]], [[0, 30, 2, 4]]]]), atol=1e-6)


def test_what_the_settings_of_a_grid_mean():
    row = torch.tensor([[-3.0, 7, 2.6, 14]])
    assert quantize_heads(row, row, row, args(symmetric=True))[1].tolist() == [[-4, 8, 2, 14]]  # step 2
    assert quantize_heads(row, row, row, args(symmetric=True, clip_ratio=0.5))[2].tolist() == [[-3, 7, 3, 7]]  # step 1
    fine = quantize_heads(row, row, row, args(num_bits=8))[1]
    assert 0 < float((fine - row).abs().max()) <= 17 / 255 / 2 + 1e-6


def test_values_may_have_other_bits_than_keys():
    row = torch.tensor([[-3.0, 7, 2.6, 14]])
    _, fine, coarse = quantize_heads(row, row, row, args(num_bits=8, value_bits=4))
    assert torch.equal(fine, quantize_heads(row, row, row, args(num_bits=8))[1])
    assert torch.equal(coarse, quantize_heads(row, row, row, args(num_bits=4))[2])
    assert not torch.equal(fine, coarse)


def test_rotated_by_hand():
    query, key = torch.tensor([[1.0, 0]]), torch.tensor([[3.0, 1]])
    q, k, v = rotate_heads(query, key, key)
    assert torch.allclose(q, torch.tensor([[1.0, 1]]) * 0.5**0.5)
    assert torch.allclose(k, torch.tensor([[4.0, 2]]) * 0.5**0.5)
    assert torch.equal(v, key)


@pytest.mark.parametrize("head_dim", [1, 8, 12, 64, 80, 7])
def test_rotation_leaves_scores_and_spreads_an_outlier(head_dim):
    query, key = torch.randn(2, 1, 3, 5, head_dim, generator=torch.Generator().manual_seed(0))
    key[..., 0] = 100
    q, k, _ = rotate_heads(query, key, key)
    assert torch.allclose(q @ k.mT, query @ key.mT, rtol=1e-4, atol=1e-3)
    assert float(k.abs().max()) < 200 / head_dim**0.5 + 5


def test_rounding_a_row_sees_no_other():
    """Hence a float cache that is rounded at each read gives what a cache of integers would."""
    key = torch.randn(1, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    whole = quantize_heads(key, key, key, args(hadamard=True))
    rows = [quantize_heads(row, row, row, args(hadamard=True)) for row in key.split(1, dim=2)]
    for x, parts in zip(whole, zip(*rows, strict=True), strict=True):
        assert torch.equal(x, torch.cat(parts, dim=2))


def test_the_gate_has_seen_the_rotation_in_every_block(artifact):
    found = artifact.manifest["gate"]["passes"]["kv_cache"]
    assert list(found) == [f"model.layers.{i}" for i in range(5)]
    assert all(0 < difference < 1e-5 for difference in found.values())


def test_a_rotation_that_moves_the_scores_is_stopped(one_layer, small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(kv_cache, "hadamard_transform", lambda x, size: x * torch.arange(1, size + 1))
    with pytest.raises(QuantizeError, match=r"`kv_cache` changes the function of model\.layers\.0"):
        small_run(one_layer, "W4A16", recipe={**RTN, **KV4})
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_the_artifact_reads_back_as_what_was_quantized(artifact):
    assert artifact.manifest["parity"]["reloaded"] < 1e-6
    assert artifact.manifest["quantization"]["kv_cache"] == args(hadamard=True).model_dump()
    assert verify_artifact(artifact.directory)["difference"] < 1e-5
    damaged = artifact.load()
    assert damaged.config._attn_implementation.startswith("quantized_kv_cache")
    tokens = torch.arange(1, 17)[None]
    exact = damaged(tokens).logits
    set_kv_cache(damaged, None)
    assert float((damaged(tokens).logits - exact).abs().max()) > 0.1  # so the cache is rounded indeed


@torch.no_grad()
def test_other_models_and_copies_keep_their_own_setting(artifact):
    tokens, first = torch.arange(1, 17)[None], artifact.load()
    expected = first(tokens).logits
    second = artifact.load()
    set_kv_cache(second, args(num_bits=8))
    exact = artifact.load()
    set_kv_cache(exact, None)
    finer, float_cache = second(tokens).logits, exact(tokens).logits
    assert float((finer - float_cache).abs().max()) < 0.2 * float((expected - float_cache).abs().max())
    for model, output in ((first, expected), (second, finer), (exact, float_cache)):
        assert torch.equal(copy.deepcopy(model)(tokens).logits, output)


@torch.no_grad()
def test_generation_is_the_same_with_and_without_a_cache(artifact, stories):
    model, tokens = artifact.load(), torch.tensor([[1, 403, 407, 261, 378]])
    found = [model.generate(tokens, max_new_tokens=40, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*found)
    assert not torch.equal(
        found[0], open_checkpoint(stories).load().generate(tokens, max_new_tokens=40, do_sample=False)
    )


@torch.no_grad()
def test_padding_is_masked(artifact):
    model, tokens = artifact.load(), torch.tensor([[1, 403, 407, 261, 378]])
    padded = torch.cat([torch.full((1, 3), 7), tokens], dim=1)
    mask = (torch.arange(8) >= 3).long()[None]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    found = model(padded, attention_mask=mask, position_ids=places).logits[:, 3:]
    assert torch.allclose(found, model(tokens).logits, atol=1e-3)


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes(one_layer, small_run, tree):
    first, second = (small_run(one_layer, recipe=KV4, output=name).directory for name in ("first", "second"))
    assert tree(first) == tree(second)


@pytest.mark.slow
def test_rotation_saves_what_key_outliers_cost(books, books_heldout, tmp_path, monkeypatch):
    """On a twin that computes the same function with a few channels of the keys × 10."""
    monkeypatch.setattr("quantize.eval.planted_outliers.FACTOR", 10.0)
    plant_keys(books, tmp_path / "twin")
    samples = read_samples(books_heldout, 128, 8, load_tokenize(books), 4096)
    batches = [batch["input_ids"] for batch in samples.batches(8)]
    twin, easy = open_checkpoint(tmp_path / "twin").load(), open_checkpoint(books).load()
    base = score_language(twin, batches, easy)
    assert base.kl < 1e-6
    kl = {}
    for hadamard in (False, True):
        set_kv_cache(twin, args(hadamard=hadamard))
        kl[hadamard] = score_language(twin, batches, easy).kl
    assert kl[True] < 0.4 * kl[False]


@pytest.mark.slow
def test_cross_attention_and_encoders_round_as_well(tmp_path):
    torch.manual_seed(0)
    size = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.BartConfig(
        d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=64, max_position_embeddings=32,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None, **size,
    )  # fmt: skip
    given = {name: torch.randint(3, 60, (4, 12)) for name in ("input_ids", "decoder_input_ids")}
    save_file(given, tmp_path / "rows.safetensors")
    artifact = quantize_model(
        transformers.BartForConditionalGeneration(config).eval(), scheme="W4A16", output_dir=tmp_path / "out",
        calibration=tmp_path / "rows.safetensors", recipe={**RTN, **KV4}, group_size=0, nsamples=4, seqlen=12,
    )  # fmt: skip
    assert len(artifact.manifest["gate"]["passes"]["kv_cache"]) == 2  # an encoder's block and a decoder's, with two
    assert verify_artifact(artifact.directory)["difference"] < 1e-5


class OwnAttention(nn.Module):
    """Attention that transformers knows nothing of, or none that a graph shows."""

    def __init__(self, written_out):
        super().__init__()
        self.embed, self.qkv, self.written_out = nn.Embedding(512, 16), nn.Linear(16, 48), written_out

    def forward(self, tokens):
        q, k, v = self.qkv(self.embed(tokens)).chunk(3, -1)
        if self.written_out:
            return (q @ k.mT).softmax(-1) @ v
        return functional.scaled_dot_product_attention(q, k, v)


class Chooses(OwnAttention):
    def forward(self, tokens):
        return super().forward(tokens) * (2 if int(tokens.sum()) else 1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (OwnAttention(True), r"graph has no scaled_dot_product_attention, .*; give a model that has it .*or leave"),
        (
            OwnAttention(False),
            r"OwnAttention does not go through transformers' AttentionInterface, .*; leave the table",
        ),
        (Chooses(False), r"cannot be exported \(.*\), so it is not known where it reads keys and values; leave"),
    ],
)
def test_attention_that_is_not_known_is_refused(model, message, small_run, tmp_path):
    with pytest.raises(UsageError, match=message):
        small_run(model.eval(), "W4A16", recipe={**RTN, **KV4})
    assert not list(tmp_path.iterdir())


def test_eager_attention_is_refused(one_layer, small_run):
    model = transformers.AutoModelForCausalLM.from_pretrained(one_layer, attn_implementation="eager")
    with pytest.raises(UsageError, match="no scaled_dot_product_attention"):
        small_run(model, recipe=KV4)


def test_a_skeleton_without_such_attention_is_refused(artifact, stories):
    skeleton = transformers.AutoModelForCausalLM.from_pretrained(stories, attn_implementation="eager")
    with pytest.raises(QuantizeError, match="the artifact quantizes the KV cache, but no attention of the model is"):
        load(artifact.directory, skeleton=skeleton)


def test_export_to_onnx_is_refused(artifact, tmp_path):
    with pytest.raises(UsageError, match=r"keys and values are quantized, .*; quantize without the table kv_cache"):
        export_artifact(artifact.directory, "onnx", tmp_path / "onnx")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="keys and values are quantized"):
        export_onnx(artifact.load(), tmp_path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "kv_cache.num_bits: field required"),
        ({"num_bits": 3}, "kv_cache.num_bits: input should be 4 or 8"),
        ({"num_bits": 4, "clip_ratio": 0}, "kv_cache.clip_ratio: input should be greater than 0"),
        ({"num_bits": 4, "residual_length": -1}, "kv_cache.residual_length: input should be greater than or equal to"),
        (
            {"num_bits": 4, "group_size": 8},
            "kv_cache.group_size: there is no such key here; did you mean `[weights] group_size`?",
        ),
    ],
)
def test_a_wrong_table_is_named(table, message):
    with pytest.raises(UsageError, match=re.escape(f"recipe: {message}")):
        load_recipe("W4A4", {"kv_cache": table})


def test_the_recipe_keeps_the_table_and_has_none_by_default():
    recipe = load_recipe("W4A4", {"kv_cache": {"num_bits": 8, "clip_ratio": 0.9}})
    assert recipe.kv_cache == args(num_bits=8, clip_ratio=0.9, hadamard=True)
    assert "[kv_cache]\nnum_bits = 8\nsymmetric = false\nclip_ratio = 0.9\nhadamard = true\n" in recipe.to_toml()
    assert load_recipe("W4A4", None).kv_cache is None


@pytest.mark.slow
def test_a_dry_run_says_how_many(one_layer, cli, tmp_path):
    (tmp_path / "recipe.toml").write_text("[kv_cache]\nnum_bits = 4\n")
    shown = cli(one_layer, "--scheme", "W4A4", "--group-size", 0, "--recipe", tmp_path / "recipe.toml", "--dry-run")
    assert "kv_cache: 4 bits at 1 attentions" in shown.out
