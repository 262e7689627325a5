"""With `genai_config.json`, onnxruntime-genai runs an exported language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantize.export.onnx.decoder import Decoder
from quantize.export.onnx.encoder_decoder import DECODER, ENCODER, EncoderDecoder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TYPES = ("llama", "qwen3", "phi3")  # checked with onnxruntime-genai 0.18, like its name for all other decoders
OTHER = "decoder"
POSITIONS = ("max_position_embeddings", "max_seq_len")  # what configs call the largest number of tokens
UNBOUNDED = 8192  # tokens of a model whose positions have no end, as onnxruntime-genai asks for a number
OF_SOUND = ("whisper",)


def genai_config(interface: Decoder, session_config: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings of a decoder as plain data.

    Source: onnxruntime.ai/docs/genai/reference/config.html.
    """
    config: PreTrainedConfig = interface.model.config.get_text_config()
    decoder = part("model.onnx", config.hidden_size, config.num_attention_heads, session_config) | {
        "head_size": interface.front_shape[3],
        "num_hidden_layers": len(interface.past) // 2,
        "num_key_value_heads": interface.front_shape[1],
        "inputs": names(interface.inputs, "past"),
        "outputs": names(interface.outputs, "present"),
    }
    kind = config.model_type if config.model_type in TYPES else OTHER
    length = next((int(found) for name in POSITIONS if (found := getattr(config, name, None))), UNBOUNDED)
    return settings(config, kind, length - interface.prefix, {"decoder": decoder})


def genai_config_of_sound(interface: EncoderDecoder, session_config: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings of an encoder's and a decoder's file; the encoder's input has the name in its file."""
    config: PreTrainedConfig = interface.model.config
    _, heads, _, width = interface.decoder.feed(1, 1, 0, 0)[interface.decoder.past[0]].shape
    common = {"head_size": width, "num_hidden_layers": len(interface.decoder.past) // 2, "num_key_value_heads": heads}
    common = part("", config.d_model, heads, session_config) | common
    (sound,) = set(interface.encoder.inputs) - set(interface.encoder.unread)
    states, *_ = interface.encoder.outputs
    encoder = {
        "inputs": {"audio_features": sound},
        "outputs": {"encoder_hidden_states": states, **keys("cross_present", "present.%d.encoder")},
    }
    own, crossed = keys("past", "past_key_values.%d.decoder"), keys("cross_past", "past_key_values.%d.encoder")
    decoder = {
        "inputs": {"input_ids": "input_ids", **own, **crossed},
        "outputs": {"logits": "logits", **keys("present", "present.%d.decoder")},
    }
    parts = {"encoder": common | encoder | {"filename": ENCODER}, "decoder": common | decoder | {"filename": DECODER}}
    return settings(config, config.model_type, int(config.max_target_positions), parts)


def keys(name: str, graph: str) -> dict[str, str]:
    """Return the names of keys and values, with %d for the layer."""
    return {f"{name}_{part}_names": f"{graph}.{part}" for part in ("key", "value")}


def part(filename: str, width: int, heads: int, session_config: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings that all files of a model have."""
    options = {"log_id": "onnxruntime-genai", "provider_options": [], **session_config}
    return {"session_options": options, "filename": filename, "hidden_size": width, "num_attention_heads": heads}


def settings(config: PreTrainedConfig, kind: str, length: int, parts: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a model that consists of some files, for at most `length` tokens."""
    tokens = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    known = {name: token for name, token in tokens.items() if token is not None}
    model = {"type": kind, "vocab_size": config.vocab_size, "context_length": length, **parts}
    search = {"max_length": length, "do_sample": False, "past_present_share_buffer": False}
    return {"model": known | model, "search": search}


def names(values: Mapping[str, object], cache: str) -> dict[str, str]:
    """Return onnxruntime-genai's name of each input or output → its name in the file, with %d for the layer."""
    stem = next(name for name in values if name.startswith(cache)).split(".")[0]
    return {name: name for name in values if not name.startswith(cache)} | keys(cache, f"{stem}.%d")
