"""`genai_config.json`, with which onnxruntime-genai runs an exported language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantize.export.decoder import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TYPES = ("llama", "qwen3", "phi3")  # checked with onnxruntime-genai 0.18, as is its name for all other decoders
OTHER = "decoder"


def genai_config(interface: Decoder, session_config: Mapping[str, str]) -> dict[str, Any]:
    """The settings of a model as plain data.

    Source: onnxruntime.ai/docs/genai/reference/config.html.
    """
    config: PreTrainedConfig = interface.model.config
    length = int(config.max_position_embeddings) - interface.prefix
    _, heads, _, width = interface.front_shape
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": [], **session_config},
        "filename": "model.onnx",
        "head_size": width,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": len(interface.past) // 2,
        "num_key_value_heads": heads,
        "inputs": names(interface.inputs, "past"),
        "outputs": names(interface.outputs, "present"),
    }
    tokens = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = {
        "type": config.model_type if config.model_type in TYPES else OTHER,
        "vocab_size": config.vocab_size,
        "context_length": length,
        "decoder": decoder,
    }
    known = {name: token for name, token in tokens.items() if token is not None}
    search = {"max_length": length, "do_sample": False, "past_present_share_buffer": False}
    return {"model": known | model, "search": search}


def names(values: Mapping[str, object], cache: str) -> dict[str, str]:
    """What onnxruntime-genai calls an input or output → its name, with %d for the layer."""
    stem = next(name for name in values if name.startswith(cache)).split(".")[0]
    cached = {f"{cache}_{part}_names": f"{stem}.%d.{part}" for part in ("key", "value")}
    return {name: name for name in values if not name.startswith(cache)} | cached
