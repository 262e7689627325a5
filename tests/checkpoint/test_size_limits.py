"""Whatever a config asks for, no more is built than its files can fill, in bounded time and memory."""

from __future__ import annotations

import cProfile
import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from quantize.checkpoint.meta_model import build_skeleton
from quantize.checkpoint.opening import open_checkpoint
from quantize.checkpoint.size_limits import NoFiles, bounded, limit_time
from quantize.errors import UsageError

pytestmark = pytest.mark.fresh

LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64,
    "long_factor": [1.0] * 10**6, "short_factor": [1.0] * 10**6,
}  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        pytest.param("LlamaForSequenceClassification", {"num_labels": 10**8}, marks=pytest.mark.slow),
        pytest.param("SwinModel", {"depths": [10**7, 2], "num_heads": [1, 1], "embed_dim": 8}, marks=pytest.mark.slow),
        pytest.param(
            "SwinModel", {"depths": [2] * 10**6, "num_heads": [1] * 10**6, "embed_dim": 8}, marks=pytest.mark.slow
        ),
        ("SwinModel", {"depths": [1], "num_heads": [1], "embed_dim": 8, "window_size": 300, "image_size": 1200}),
        pytest.param("LlamaForCausalLM", {"rope_parameters": LONGROPE}, marks=pytest.mark.slow),
        ("GPTNeoForCausalLM", {"max_position_embeddings": 60_000, "hidden_size": 16}),
        ("GPT2LMHeadModel", {"n_positions": 60_000, "n_embd": 4, "n_head": 1, "n_layer": 99}),
        ("CodeGenForCausalLM", {"n_positions": 10**9, "n_embd": 16, "n_head": 4, "rotary_dim": 4, "n_layer": 1}),
        ("WhisperModel", {"max_source_positions": 10**9}),
        ("BertModel", {"max_position_embeddings": 10**10}),
        ("Wav2Vec2ForCTC", {"conv_dim": [1] * 10**5, "conv_stride": [1] * 10**5, "conv_kernel": [1] * 10**5}),
        pytest.param("Gemma3ForCausalLM", {"num_hidden_layers": 10**10}, marks=pytest.mark.slow),
        ("ResNetModel", {"depths": [10**9], "hidden_sizes": [8]}),
    ],
)
def test_whatever_a_config_asks_for_is_bounded_by_the_files(architecture, config, variant):
    model = variant()
    (model / "config.json").write_text(json.dumps({"architectures": [architecture], **config}))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    started, before = time.thread_time(), peak_memory()
    with pytest.raises(UsageError, match=f"the config does not build a {architecture}: "):
        open_checkpoint(model).skeleton()
    assert time.thread_time() - started < 15
    assert peak_memory() - before < 1.5e9


def peak_memory():
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Sequential(*(nn.ReLU() for _ in range(65))), "more than 64 modules"),
        (lambda: [nn.Linear(1, 1) for _ in range(33)], "more than 64 parameters"),
        (lambda: nn.Linear(1 << 10, (1 << 10) + 1), "more than 1048576 elements"),
        (
            lambda: nn.Module().register_buffer("mask", torch.ones(1 << 27, dtype=torch.bool)[None].repeat(2, 1)),
            "bytes",
        ),
        (lambda: [0] * 10**9, "it takes more than 1073741824 bytes beside its weights"),
    ],
)
def test_each_bound_holds(make, words):
    with pytest.raises(ValueError, match=words), bounded({}), torch.device("meta"):
        make()
    with bounded({}):
        nn.Linear(8, 8)


def test_a_constructor_that_never_ends_is_ended():
    def swallow():
        while True:
            try:
                while True:
                    pass
            except Exception:
                continue

    with (
        pytest.raises(ValueError, match="it takes more than 0 s, far more than nothing need"),
        limit_time(0.2, "nothing"),
    ):
        swallow()
    started = time.monotonic()
    while time.monotonic() - started < 0.3:  # nothing is raised afterwards
        with limit_time(10, "nothing"):
            pass


def test_what_unwinds_is_not_interrupted_again():
    """A second interruption would strike where other limits and modes are taken back, and leave them behind."""
    unwound = []

    def slow_to_unwind():
        try:
            while True:
                pass
        finally:
            end = time.thread_time() + 0.3
            while time.thread_time() < end:
                pass
            unwound.append(True)

    with pytest.raises(ValueError, match="it takes more than 0 s"), limit_time(0.1, "nothing"):
        slow_to_unwind()
    assert unwound


def test_a_profiler_may_watch_what_is_bounded():
    """An interruption that was taken back left the interpreter looking for it, in which a profiler never ended."""
    profiler = cProfile.Profile()
    profiler.enable()
    with bounded({}):
        sum(range(1000))
    profiler.disable()


@pytest.mark.slow
def test_a_large_model_is_built_within_the_bounds():
    """Weights of 4096 × 1024 were made in memory one by one, and the holes that they left filled it."""
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = LlamaConfig(**shape, num_hidden_layers=32, vocab_size=128256, architectures=["LlamaForCausalLM"])
    model = build_skeleton(config.to_dict(), NoFiles())
    assert sum(x.numel() for x in model.parameters()) == 8_030_261_248
