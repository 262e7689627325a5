"""Random Llamas of the shapes of known models are written shard by shard, with at most one layer in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

SHAPES: dict[str, dict[str, int | bool]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
             "vocab_size": 512, "tie_word_embeddings": True},
    "1.1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
             "vocab_size": 32000, "tie_word_embeddings": True},
    "1.1B untied": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
                    "vocab_size": 32000, "tie_word_embeddings": False},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "num_key_value_heads": 8,
           "vocab_size": 128256, "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
           "vocab_size": 128256, "tie_word_embeddings": False},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8,
            "vocab_size": 128256, "tie_word_embeddings": False},
}  # fmt: skip


def write_model(directory: Path, size: str, layers: int, device: str = "cpu") -> int:
    """Write a model of so many layers in bf16, with the same bytes each time; return the number of its parameters.

    The numbers are drawn on a device, and those of one kind of device differ from those of another.
    """
    directory.mkdir(parents=True)
    shape = SHAPES[size]
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers,
              "max_position_embeddings": 2048, "dtype": "bfloat16", **shape}  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    total, places = 0, dict[str, str]()
    for number, tensors in enumerate(shards(size, layers, device)):
        file = f"model-{number + 1:05}-of-{layers + 2:05}.safetensors"
        save_file(tensors, directory / file, {"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        total += sum(t.numel() for t in tensors.values())
    index = {"metadata": {"total_size": 2 * total}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def shards(size: str, layers: int, device: str) -> Iterator[dict[str, Tensor]]:
    """Yield the embeddings, each layer, and what follows the layers."""
    shape = SHAPES[size]
    d, f, vocab = int(shape["hidden_size"]), int(shape["intermediate_size"]), int(shape["vocab_size"])
    kv = d // int(shape["num_attention_heads"]) * int(shape["num_key_value_heads"])
    yield {"model.embed_tokens.weight": normal(vocab, d, 0, device)}
    for layer in range(layers):
        sizes = {"self_attn.q": (d, d), "self_attn.k": (kv, d), "self_attn.v": (kv, d), "self_attn.o": (d, d),
                 "mlp.gate": (f, d), "mlp.up": (f, d), "mlp.down": (d, f)}  # fmt: skip
        made = {f"{name}_proj": normal(*nk, 100 * layer + i, device) for i, (name, nk) in enumerate(sizes.items(), 1)}
        norms = ("input_layernorm", "post_attention_layernorm")
        made |= {name: norm(d, 100 * layer + i, device) for i, name in enumerate(norms, len(made) + 1)}
        yield {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in made.items()}
    head = {} if shape["tie_word_embeddings"] else {"lm_head.weight": normal(vocab, d, 99, device)}
    yield head | {"model.norm.weight": norm(d, 98, device)}


def normal(rows: int, columns: int, seed: int, device: str) -> Tensor:
    """Return bf16 [rows, columns] of standard deviation 0.02."""
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator, device=device) * 0.02).bfloat16().cpu()


def norm(width: int, seed: int, device: str) -> Tensor:
    """Return bf16 [width] near 1, as in trained norms, so that no gain is 1 and every wrong fold shows."""
    return 1 + 5 * normal(1, width, seed, device)[0]


def write_tokens(path: Path, size: str, samples: int, seqlen: int) -> None:
    """Write rows of random token ids."""
    vocab = int(SHAPES[size]["vocab_size"])
    ids = torch.randint(vocab, (samples, seqlen), generator=torch.Generator().manual_seed(1))
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids.tolist()))
