"""`make bench-whole` prints what large mixtures would take, disk and memory, from their configs alone."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import transformers
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from quantize.eval.demo import ROUND_TO_NEAREST
from quantize.pipeline.estimate.peak_memory import peak_memory
from quantize.pipeline.estimate.report import human, preflight
from quantize.pipeline.prepare import prepare
from quantize.recipe.recipe import load_recipe

QWEN3_30B_A3B = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "norm_topk_prob": True, "max_position_embeddings": 40960, "rope_theta": 1e6,
    "tie_word_embeddings": False,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # name → its type in transformers, and what its config says
    "Qwen3-30B-A3B": ("qwen3_moe", QWEN3_30B_A3B),
    "DeepSeek-V3": ("deepseek_v3", {}),  # the defaults of the class are this model's
}


def write_config(directory: Path, model_type: str, settings: dict[str, Any]) -> None:
    """Write a `config.json` as transformers writes it, with the class that generates text."""
    config = transformers.CONFIG_MAPPING[model_type](**settings)
    name = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    content = {**config.to_dict(), "architectures": [name], "dtype": "bfloat16"}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(content))


def main() -> None:
    """Print a row for each model and recipe."""
    table = Table("model", "parameters", "float", "recipe, W4A16", "artifact", "beside it", "memory", box=SIMPLE_HEAD)
    with tempfile.TemporaryDirectory() as scratch:
        for name, (model_type, settings) in MODELS.items():
            write_config(Path(scratch) / name, model_type, settings)
            for label, recipe in (("plain rounding", ROUND_TO_NEAREST), ("default", {})):
                prepared = prepare(Path(scratch) / name, load_recipe("W4A16", recipe), None, read=False)
                found = preflight(prepared)
                table.add_row(
                    name, f"{found.parameter_count():,}", human(found.float_bytes()), label,
                    human(found.artifact_bytes()), human(found.journal_bytes()),
                    human(peak_memory() + found.memory_bytes()),
                )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
