"""A small mixture of experts whose graph has all that the analysis of experts looks for, under names of its own."""

from typing import Any

import torch
import transformers
import transformers.integrations.moe  # registers its products
from torch import Tensor, nn


class Mixture(nn.Module):
    """Tokens go to two of four experts, whose weights are stacks; a convolution is a stack of another kind."""

    def __init__(self, vocabulary: int = 32, width: int = 16, inner: int = 24, experts: int = 4) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.mix = nn.Conv1d(width, width, 3, padding=1)
        self.chooser = nn.Linear(width, experts, bias=False)
        self.rise = nn.Parameter(torch.randn(experts, inner, width) / 4)
        self.fall = nn.Parameter(torch.randn(experts, inner, width) / 4)
        self.score = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, T] → [B, T, vocabulary]."""
        x = self.words(input_ids)
        x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        return self.score(x + self.experts(x.flatten(0, 1)).view_as(x))

    def experts(self, x: Tensor) -> Tensor:
        weights, chosen = self.chooser(x).softmax(-1).topk(2, dim=-1)
        numbers, order = chosen.flatten().sort()
        counts = torch.nn.functional.one_hot(numbers, len(self.rise)).sum(0)
        offs = counts.cumsum(0, dtype=torch.int32)
        product = torch.ops.transformers.grouped_mm_fallback
        inner = product(x[order // 2], self.rise.transpose(-2, -1), offs=offs).relu()
        y = product(inner, self.fall, offs=offs) * weights.flatten()[order][:, None]
        return torch.zeros_like(x).index_add(0, order // 2, y)


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
MOE = {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "intermediate_size": 64}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
GROUPS = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
SHARED = {"shared_expert_intermediate_size": 32}
TWO_KINDS = {"layer_types": ["linear_attention", "full_attention"]}
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
FAMILIES = {  # model type → what its config has besides `SMALL`
    "mixtral": {"intermediate_size": 48, "num_local_experts": 4},
    "qwen2_moe": {**MOE, **SHARED, "num_experts": 4},
    "qwen3_moe": {**MOE, "num_experts": 8},
    "olmoe": {"intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v3": {**MOE, **LATENT, **GROUPS, "num_key_value_heads": 4},
    "gpt_oss": {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    "glm4_moe": {**MOE, **GROUPS, "n_group": 1},
    "granitemoe": {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {
        "intermediate_size": 32, "intermediate_size_mlp": 64, "num_local_experts": 4, "num_experts_per_tok": 1,
        "attention_chunk_size": 16,
    },
    "qwen3_next": {**MOE, **SHARED, **TWO_KINDS, **LINEAR_ATTENTION, "num_experts": 4},
}  # fmt: skip


def build_family(name: str, **changes: Any) -> transformers.PreTrainedModel:
    """Return a tiny random model of a family, with weights so large that its scores differ; `changes` of its config."""
    config = transformers.CONFIG_MAPPING[name](**{**SMALL, **FAMILIES[name], **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1, generator=generator)
            elif not bool(parameter.isfinite().all()):
                parameter.zero_()
    return model
