"""Random tiny models of the types that runtimes are tried with, beside the small real one of the tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
BOOKS, TEXT = ROOT / "tests/models/books-llama-6m", ROOT / "tests/data/books/heldout.txt"
COMMON = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 2, "vocab_size": 4096,
    "num_key_value_heads": 1, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": None, "tie_word_embeddings": True,
}  # fmt: skip
OWN = {
    "qwen2": {}, "qwen3": {"head_dim": 128}, "gemma3_text": {"head_dim": 256, "sliding_window": 16},
    "qwen3_moe": {"head_dim": 64, "moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


def make_tiny(kind: str, directory: Path) -> Path:
    """Write a random model of a type in bfloat16, with the tokenizer of books-llama, and return its directory."""
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**{**COMMON, **OWN[kind]})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1 if parameter.dim() > 1 else 0.3)
    model.to(torch.bfloat16).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BOOKS / name, directory)
    return directory
