"""Tiny random models of families that transformers has: every size of a config that is known by name is made small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCABULARY = 384
SPECIAL = 8  # ids at the end of the vocabulary that stand for images and the like
WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "model_dim", "emb_dim", "embedding_size", "lru_width",
          "word_embed_proj_dim", "moe_intermediate_size", "shared_expert_intermediate_size", "expert_dim",
          "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size", "max_source_positions")  # fmt: skip
INNER = ("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "dff", "n_inner",
         "ffn_hidden_size", "shared_intermediate_size", "mamba_d_ssm", "max_target_positions")  # fmt: skip
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
          "num_encoder_layers", "num_decoder_layers")  # fmt: skip
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len", "max_sequence_length")
HEAD_WIDTHS = ("head_dim", "d_kv", "attention_head_dim", "kv_channels", "qk_rope_head_dim", "qk_nope_head_dim",
               "v_head_dim", "mamba_d_state", "mamba_d_head", "state_size", "mamba_head_dim", "linear_key_head_dim",
               "linear_value_head_dim", "index_head_dim", "index_topk", "rotary_dim")  # fmt: skip
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "linear_num_value_heads")
TWO = ("num_key_value_heads", "num_kv_heads", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k",
       "moe_k", "linear_num_key_heads", "index_n_heads")  # fmt: skip
ONE = ("n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups")
SIZES = {
    **dict.fromkeys(WIDTHS, 64), **dict.fromkeys(INNER, 128), **dict.fromkeys(LAYERS, 2), **dict.fromkeys(HEADS, 4),
    **dict.fromkeys(POSITIONS, 256), **dict.fromkeys(HEAD_WIDTHS, 16), **dict.fromkeys(EXPERTS, 4),
    **dict.fromkeys(TWO, 2), **dict.fromkeys(ONE, 1), **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("mamba_n_heads", "time_step_rank", "mamba_dt_rank", "mamba_num_heads"), 8),
    "vocab_size": VOCABULARY,
}  # fmt: skip
NEVER_SET = ("num_key_value_heads", "head_dim")  # sizes that a config leaves open, and that are set all the same
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """Return the config of a model type with its sizes made small, and then changed as told."""
    cls = CONFIG_MAPPING[model_type]
    try:
        default = cls().to_dict()
    except Exception:  # some configs cannot be built without arguments
        default = {}
    names = {known: getattr(cls, "attribute_map", {}).get(known, known) for known in SIZES}
    small = {
        name: SIZES[known]
        for known, name in names.items()
        if name in default and not isinstance(default[name], bool)
        if isinstance(default[name], int | float) or (default[name] is None and known in NEVER_SET)
    }
    if "vocab_size" in default:
        small |= small_ids(default)
    return cls(**small | changes)


def small_ids(default: dict[str, Any]) -> dict[str, int]:
    """Return an id within the small vocabulary for each special token of a config that lies behind it."""
    ids = {name: value for name, value in default.items() if name.endswith(("_token_id", "_token_index"))}
    large = sorted(n for n, value in ids.items() if isinstance(value, list) or (value or 0) >= VOCABULARY)
    return {name: IDS.get(name, VOCABULARY - 1 - at % SPECIAL) for at, name in enumerate(large)}


def build(architecture: str | None, config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Build a model in float32 with random weights as large as those of trained models; None is a causal LM."""
    transformers.set_seed(seed)
    cls = getattr(transformers, architecture or "", None)
    model = AutoModelForCausalLM.from_config(config) if cls is None else cls(config)
    randomize(model, seed)
    return model.float().eval()


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Make weights that are initialized to almost nothing larger, and constant gains and biases random, in place."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor, scale: float) -> Tensor:
        return scale * torch.randn(like.shape, generator=generator)

    for parameter in model.parameters():
        spread = float(parameter.std()) if parameter.numel() > 1 else 1.0
        if not parameter.isfinite().all():
            parameter.copy_(noise(parameter, 0.05))
        elif parameter.numel() == max(parameter.shape, default=1):
            parameter.add_(noise(parameter, 0.1) if spread < 1e-6 else 0)
        elif spread < 1e-6:
            parameter.copy_(noise(parameter, 0.08))
        elif spread < 0.04:
            parameter.mul_(min(4.0, 0.08 / spread))


def save(model: PreTrainedModel, directory: Path) -> None:
    """Write a model as a directory of its own."""
    model.save_pretrained(directory)
