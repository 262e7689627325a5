"""A packed KV cache: its bytes, and that a model computes with it what it computes without."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

import quantize
from quantize.errors import UsageError
from quantize.nn.attention import set_kv_cache
from quantize.nn.packed_cache import PackedSlidingLayer, pack_rows, packed_cache, unpack_rows
from quantize.nn.prefix_hooks import CACHES
from quantize.scheme.scheme import KVCacheArgs

ARGUMENT = next(name for name in CACHES if name in inspect.signature(MistralForCausalLM.forward).parameters)
SETTINGS = [
    KVCacheArgs(num_bits=4),
    KVCacheArgs(num_bits=8, value_bits=4, hadamard=False),
    KVCacheArgs(num_bits=4, symmetric=True, clip_ratio=0.9),
    KVCacheArgs(num_bits=4, residual_length=1),
    KVCacheArgs(num_bits=4, residual_length=3),
    KVCacheArgs(num_bits=4, residual_length=8, hadamard=False),
]


def model(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=64, intermediate_size=32, head_dim=12, eos_token_id=None, **sizes, **changes)
    made = MistralForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return made


def test_rows_by_hand():
    """Codes -8, -4, 7, 1 with two's complement nibbles from the low one on, a scale of 1 and a zero point of -5."""
    x = torch.tensor([[-3.0, 1.0, 12.0, 6.0]])
    args = KVCacheArgs(num_bits=4, hadamard=False)
    rows = pack_rows(x, 4, args)
    assert rows.tolist() == [[0xC8, 0x17, 0, 0, 0x80, 0x3F, 0x100 - 5]]
    assert torch.equal(unpack_rows(rows, 4, 4, args), x)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("args", SETTINGS)
@torch.no_grad()
def test_a_model_computes_what_it_computes_without(args, window):
    """A prompt, tokens one by one, beyond a window, and rows that change places."""
    made = model(sliding_window=window)
    set_kv_cache(made, args)
    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))
    caches = packed_cache(made), DynamicCache(config=made.config)
    whole = made(ids).logits
    for cut in (slice(0, 5), *(slice(n, n + 1) for n in range(5, 10))):
        found, expected = (made(ids[:, cut], **{ARGUMENT: cache}).logits for cache in caches)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found, whole[:, cut], rtol=1e-4, atol=1e-4)
    for cache in caches:
        cache.reorder_cache(torch.tensor([1, 0]))
    found, expected = (made(ids[:, 10:], **{ARGUMENT: cache}).logits for cache in caches)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    held = caches[0].layers[0]
    assert isinstance(held, PackedSlidingLayer) is (window is not None)
    bits, rest = args.bits, 4 if args.symmetric else 5
    assert (held.keys.dtype, held.keys.shape[-1]) == (torch.uint8, 12 * bits[0] // 8 + rest)
    assert held.values.shape[-1] == 12 * bits[1] // 8 + rest
    if args.residual_length:
        assert held.recent.keys.shape == (2, 2, min(args.residual_length, 12), 12)


@torch.no_grad()
def test_recent_rows_follow_the_packed_ones():
    """Tokens that are taken back, as speculative decoding does, rows of a batch that are repeated and chosen, reset."""
    made = model()
    set_kv_cache(made, KVCacheArgs(num_bits=4, residual_length=3))
    ids = torch.randint(64, (1, 12), generator=torch.Generator().manual_seed(1))
    cache = packed_cache(made)
    made(ids[:, :6], **{ARGUMENT: cache})
    with pytest.raises(RuntimeError, match="past"):  # what left the window is no longer held
        cache.crop(-2)
    assert cache.get_seq_length() == 6
    cache.activate_past_recording()
    made(ids[:, [6, 0, 0]], **{ARGUMENT: cache})
    cache.crop(-2)
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([0, 2]))
    found = made(ids[:, 7:].expand(2, -1), **{ARGUMENT: cache}).logits
    torch.testing.assert_close(found, made(ids).logits[:, 7:].expand(2, -1, -1), rtol=1e-4, atol=1e-4)
    cache.reset()
    torch.testing.assert_close(made(ids, **{ARGUMENT: cache}).logits, made(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_loaded_artifact_generates_with_it(stories, stories_calibration, tmp_path):
    artifact = quantize.quantize_model(
        stories, scheme="W4A16", output_dir=tmp_path / "out", calibration=stories_calibration, nsamples=2, seqlen=16,
        group_size=0,
        recipe={"passes": [], "quantizer": {"name": "rtn"}, "kv_cache": {"num_bits": 4, "residual_length": 3}},
    )  # fmt: skip
    assert artifact.manifest["parity"]["reloaded"] < 1e-6
    loaded, ids = artifact.load(), torch.tensor([[1, 403, 407, 261]])
    cache = quantize.packed_cache(loaded)
    settings = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **{ARGUMENT: cache}, **settings), loaded.generate(ids, **settings))
    assert {layer.keys.dtype for layer in cache.layers} == {torch.uint8}


def test_a_cache_in_floating_point_has_no_packed_form():
    with pytest.raises(UsageError, match=r"keys and values are in floating point; quantize with a table \[kv_cache\]"):
        packed_cache(model())
