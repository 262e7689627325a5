"""What vLLM holds as one weight or splits must fit together; make test-vllm runs the rest of the plugin."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from quantize.artifact.manifest import Entry, QuantizationSettings
from quantize.artifact.vllm.layers import cache_note, linears_of, require_one_weight, require_served, require_split
from quantize.errors import UsageError
from quantize.scheme.scheme import ActivationArgs, KVCacheArgs, RuntimeSmoothArgs, Scheme, WeightArgs

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
W4A8 = Scheme(weights=WeightArgs(num_bits=4, group_size=32), activations=ActivationArgs(num_bits=8))
W3A16 = Scheme(weights=WeightArgs(num_bits=3, group_size=6))  # of which only 8 weights fill whole bytes
ENTRY = Entry(columns=128)


def settings(**more):
    return QuantizationSettings(quant_method="quantize-model", scheme=W4A8, **{"modules": {"a.o_proj": ENTRY}, **more})


def test_the_plugin_is_an_entry_point_that_imports_without_vllm():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (module, _, name) = project["entry-points"]["vllm.general_plugins"]["quantize-model"].partition(":")
    assert callable(getattr(__import__(module, fromlist=[name]), name))


def test_a_prefix_and_experts_in_one_tensor_are_refused():
    require_served(settings())
    with pytest.raises(UsageError, match="has a prefix, in front of which vLLM puts no tokens; quantize without"):
        require_served(settings(prefix=(1, 2)))
    with pytest.raises(UsageError, match=r"a\.experts holds experts in one tensor, which the plugin does not serve"):
        require_served(settings(modules={"a.experts": Entry(columns=128, experts=4)}))


def test_what_serves_a_quantized_cache():
    assert cache_note(KVCacheArgs(num_bits=8)).endswith("which --kv-cache-dtype int8_per_token_head serves.")
    note = cache_note(KVCacheArgs(num_bits=4, residual_length=16))
    assert note.endswith("int4_per_token_head serves, without its recent tokens in floating point.")


def test_a_layer_has_the_linears_that_vllm_made_it_of():
    paths = [f"m.0.{name}" for name in FUSED["qkv_proj"]]
    assert linears_of("m.0.qkv_proj", FUSED, dict.fromkeys(paths, ENTRY)) == paths
    assert linears_of("lm_head", FUSED, {"lm_head": ENTRY}) == ["lm_head"]
    assert linears_of("m.0.qkv_proj", FUSED, {"m.0.o_proj": ENTRY}) == []
    with pytest.raises(UsageError, match=r"m\.0\.q_proj and m\.0\.v_proj as one weight, but only the first is"):
        linears_of("m.0.qkv_proj", FUSED, dict.fromkeys(paths[:2], ENTRY))


def test_weights_held_as_one_have_one_format():
    other = Scheme(weights=WeightArgs(num_bits=8), activations=W4A8.activations)
    clipped = Scheme(weights=W4A8.weights, activations=ActivationArgs(num_bits=8, clip_ratio=0.9))
    require_one_weight({"q": W4A8, "k": clipped})
    with pytest.raises(
        UsageError, match="q and k as one weight, but one is int4 in groups of 32 and one int8 in groups"
    ):
        require_one_weight({"q": W4A8, "k": other})


def hadamard(size, stride=1):
    return Entry(columns=128, online=({"kind": "hadamard", "size": size, "stride": stride},))


@pytest.mark.parametrize("entry", [ENTRY, hadamard(32), hadamard(16, 4)])
def test_columns_are_split_between_groups_and_blocks(entry):
    require_split("o_proj", entry, W4A8, 2)


SMOOTH = ActivationArgs(num_bits=8, runtime_smooth=RuntimeSmoothArgs(group_size=32))


@pytest.mark.parametrize(
    ("entry", "scheme", "ranks", "words"),
    [
        (ENTRY, Scheme(weights=W4A8.weights, activations=SMOOTH), 2, "runtime_smooth, which sorts all 128 channels"),
        (ENTRY, W4A8, 8, "groups of 32 columns, which do not divide the 16 columns of each of 8 ranks; use a smaller"),
        (Entry(columns=24), W3A16, 4, "groups of 24 columns, which do not divide the 6 columns of each of 4 ranks"),
        (hadamard(128), W4A8, 2, "an online transform .hadamard. over more than the 64 channels of each of 2 ranks"),
        (hadamard(32, 4), W4A8, 2, "an online transform .hadamard. over more than the 64 channels"),
        (Entry(columns=128, online=({"kind": "dual"},)), W4A8, 2, "an online transform .dual. over more than"),
    ],
)
def test_what_would_reach_over_ranks_is_refused(entry, scheme, ranks, words):
    with pytest.raises(UsageError, match=f"o_proj has {words}"):
        require_split("o_proj", entry, scheme, ranks)
