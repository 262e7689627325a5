"""The metadata and the tensors of a GGUF file become those of transformers, for Llama, Qwen2 and Gemma 3."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor
from transformers import Gemma3TextConfig, LlamaConfig, Qwen2Config

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "gemma3": "Gemma3ForCausalLM"}
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INNER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
GEMMA = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


class GgufModel:
    """The metadata and the tensors of a GGUF under the names of transformers."""

    def __init__(self, path: Path) -> None:
        self.reader = GGUFReader(path)
        self.architecture = self.value("general.architecture")

    def value(self, key: str) -> Any:
        """Return a field of the metadata; None if it is missing."""
        field = self.reader.fields.get(key)
        return None if field is None else field.contents()

    def setting(self, key: str) -> Any:
        """Return a field of the architecture."""
        return self.value(f"{self.architecture}.{key}")

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors, dequantized, in bfloat16."""
        return dict(self.converted(tensor) for tensor in self.reader.tensors)

    def converted(self, tensor: Any) -> tuple[str, Tensor]:
        """Return name and values of a tensor.

        llama.cpp interleaves the two halves of each head of Llama's queries and keys, and adds 1 to Gemma's gains.
        """
        w = dequantize(tensor.data, tensor.tensor_type).reshape([int(size) for size in tensor.shape[::-1]])
        path, _, kind = tensor.name.rpartition(".")
        *layer, part = path.split(".")
        inner = INNER | (GEMMA if self.architecture == "gemma3" else {})
        name = f"model.layers.{layer[1]}.{inner[part]}" if layer else OUTER[part]
        if self.architecture == "llama" and part in ("attn_q", "attn_k"):
            heads = self.setting("attention.head_count" if part == "attn_q" else "attention.head_count_kv")
            w = w.reshape(heads, -1, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
        if self.architecture == "gemma3" and name.endswith("norm"):
            w = w - 1
        return f"{name}.{kind}", torch.from_numpy(np.array(w, np.float32)).bfloat16()

    def config(self, tensors: Mapping[str, Tensor]) -> Any:
        """Return the config of transformers."""
        tokens = {name: self.value(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding")}
        layers, theta = self.setting("block_count"), self.setting("rope.freq_base")
        common: dict[str, Any] = {
            "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
            "hidden_size": self.setting("embedding_length"),
            "intermediate_size": self.setting("feed_forward_length"),
            "num_hidden_layers": layers,
            "num_attention_heads": self.setting("attention.head_count"),
            "num_key_value_heads": self.setting("attention.head_count_kv"),
            "rms_norm_eps": self.setting("attention.layer_norm_rms_epsilon"),
            "max_position_embeddings": self.setting("context_length"),
            "tie_word_embeddings": "lm_head.weight" not in tensors,
            "dtype": "bfloat16",
            "architectures": [ARCHITECTURES[self.architecture]],
            "bos_token_id": tokens["bos"], "eos_token_id": tokens["eos"], "pad_token_id": tokens["padding"],
        }  # fmt: skip
        rope = {"rope_type": "default", "rope_theta": theta}
        if self.architecture != "gemma3":
            return (LlamaConfig if self.architecture == "llama" else Qwen2Config)(**common, rope_parameters=rope)
        kinds = ["full_attention" if (n + 1) % 6 == 0 else "sliding_attention" for n in range(layers)]
        width = self.setting("attention.key_length")
        return Gemma3TextConfig(
            **common, head_dim=width, query_pre_attn_scalar=width, layer_types=kinds,
            sliding_window=self.setting("attention.sliding_window"),
            rope_parameters={"sliding_attention": rope | {"rope_theta": 1e4}, "full_attention": rope},
        )  # fmt: skip
