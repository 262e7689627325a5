"""GGUF names architectures; these are those that artifacts are written for, and what llama.cpp fixes of each.

This is the file format's own table: it decides under which names weights are stored, and nothing about where
transforms are legal. Source: llama.cpp, `conversion/*.py` for what is stored and `src/models/*.cpp` for what is fixed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType
from torch import Tensor

from quantize.export.base import Obstacle

FLOAT = "run the artifact itself, or export it to another target"


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp fixes of the models of a type.

    Attributes:
        arch: the architecture.
        activation: the only activation function, as transformers names it.
        rope_types: the kinds of rotary embedding that can be stored.
        interleaved: the linears whose rows are reordered, as neighbouring channels of theirs are rotated together.
        norm_shift: what is added to the gains of norms.
        full_attention_every: every so many layers attend to everything, the others to a window; 0 for all layers.
        square: whether all heads of queries together are as wide as the residual stream.
    """

    arch: MODEL_ARCH
    activation: str = "silu"
    rope_types: tuple[str, ...] = ("default", "linear")
    interleaved: tuple[str, ...] = ()
    norm_shift: float = 0.0
    full_attention_every: int = 0
    square: bool = False


ARCHITECTURES = {
    "llama": Architecture(
        MODEL_ARCH.LLAMA, rope_types=("default", "linear", "llama3"), interleaved=("q_proj", "k_proj")
    ),
    "qwen2": Architecture(MODEL_ARCH.QWEN2, square=True),
    "qwen3": Architecture(MODEL_ARCH.QWEN3),
    "gemma3_text": Architecture(
        MODEL_ARCH.GEMMA3, activation="gelu_pytorch_tanh", norm_shift=1.0, full_attention_every=6
    ),
}


def head_dim(config: Mapping[str, Any]) -> int:
    """Return the channels of a head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope(config: Mapping[str, Any], kind: str = "full_attention") -> dict[str, Any]:
    """Return the parameters of the rotary embedding in layers of a kind, with `rope_type` and `rope_theta`."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = given.get(kind, given)
    named = found.get("rope_type") or found.get("type") or "default"
    return {"rope_theta": config.get("rope_theta", 10000.0), **found, "rope_type": named}


def unsupported(config: Mapping[str, Any]) -> Iterator[Obstacle]:
    """Yield what llama.cpp does not compute of a model of a known type."""
    known, width = ARCHITECTURES[config["model_type"]], head_dim(config)
    name, heads = known.arch.name.lower(), config["num_attention_heads"]
    activation = config.get("hidden_act") or config.get("hidden_activation")
    if activation != known.activation:
        yield Obstacle(f"llama.cpp computes {known.activation} in {name} models, and this has {activation}", FLOAT)
    for kind in ("full_attention", "sliding_attention"):
        if (found := rope(config, kind)["rope_type"]) not in known.rope_types:
            yield Obstacle(f"rotary embeddings of the type {found} have no place in a GGUF file of {name}", FLOAT)
    if known.square and heads * width != config["hidden_size"]:
        yield Obstacle(f"llama.cpp reads {name} models whose heads are as wide as the residual stream alone", FLOAT)
    layers, every = config.get("layer_types") or [], known.full_attention_every
    wanted = [
        "full_attention" if not every or (i + 1) % every == 0 else "sliding_attention" for i in range(len(layers))
    ]
    if layers != wanted or config.get("use_sliding_window"):
        rule = f"each {every}th layer" if every else "all layers"
        yield Obstacle(f"llama.cpp lets {rule} of {name} models attend to all tokens, and this model does not", FLOAT)
    if config.get("query_pre_attn_scalar", width) != width:
        yield Obstacle(f"llama.cpp divides scores of {name} models by the root of {width}, and this does not", FLOAT)
    if config.get("attn_logit_softcapping") or config.get("use_bidirectional_attention"):
        yield Obstacle(f"{name} models attend forwards and without a cap in llama.cpp, and this does not", FLOAT)


def add_metadata(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    """Add what llama.cpp needs to know of a model besides its weights."""
    known, width, base = ARCHITECTURES[config["model_type"]], head_dim(config), rope(config)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(base["rope_theta"])
    if base["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(base["factor"])
    if known.full_attention_every:
        writer.add_sliding_window(config["sliding_window"])
        writer.add_rope_freq_base_swa(rope(config, "sliding_attention")["rope_theta"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def rope_factors(config: Mapping[str, Any]) -> Tensor | None:
    """Return what each frequency is divided by, float32 [head_dim / 2], for rotary embeddings of Llama 3, or None."""
    found = rope(config)
    if found["rope_type"] != "llama3":
        return None
    channels = torch.arange(0, head_dim(config), 2, dtype=torch.float32) / head_dim(config)
    wavelengths = 2 * math.pi * found["rope_theta"] ** channels
    turns = found["original_max_position_embeddings"] / wavelengths
    low, high, factor = found["low_freq_factor"], found["high_freq_factor"], found["factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    divisors: Tensor = 1 / ((1 - smooth) / factor + smooth)
    return divisors
