"""`python -m benchmarks.kv_cache_parts MODEL` measures what stays in floating point beside a KV cache of few bits.

The weights of MODEL stay in floating point. Rounded are all keys and values, or all but those of the first tokens, of
the last tokens before each query, or of the first and the last block.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from quantize.calibration.data import read_samples
from quantize.checkpoint.opening import open_checkpoint
from quantize.checkpoint.tokenizer import load_tokenize
from quantize.eval.perplexity import score_language
from quantize.nn.attention import configs
from quantize.nn.kv_cache import quantize_heads
from quantize.scheme.scheme import KVCacheArgs

TESTS = Path(__file__).resolve().parents[1] / "tests"
BOOKS, TEXT = TESTS / "models" / "books-llama-6m", TESTS / "data" / "books" / "heldout.txt"
WINDOW, BATCH = 256, 4
NAME = "kv_cache_in_parts"


@dataclass(frozen=True)
class Parts:
    """What of a cache stays in floating point.

    Attributes:
        args: how the rest is rounded; None rounds nothing.
        first: tokens at the start.
        recent: tokens before each query, with its own.
        blocks: blocks at the start, and as many at the end.
    """

    args: KVCacheArgs | None = None
    first: int = 0
    recent: int = 0
    blocks: int = 0


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, parts: Parts,
    scaling: float | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Compute causal attention of whole sequences on [batch, heads, tokens, head_dim], written out."""
    del attention_mask
    at: Any = module
    layers, number = at.config.num_hidden_layers, at.layer_idx
    rounded = (query, key, value)
    if parts.args is not None and min(number, layers - 1 - number) >= parts.blocks:
        rounded = quantize_heads(query, key, value, parts.args)
    repeats = query.shape[1] // key.shape[1]
    turned, near_key, far_key, near_value, far_value = (
        x.repeat_interleave(repeats, 1) if x.shape[1] != query.shape[1] else x
        for x in (rounded[0], key, rounded[1], value, rounded[2])
    )
    tokens = torch.arange(key.shape[2])
    age = tokens[:, None] - tokens
    near = ((age < parts.recent) | (tokens < parts.first)) & (age >= 0)
    scores = torch.where(near, query @ near_key.mT, turned @ far_key.mT) * (scaling or query.shape[-1] ** -0.5)
    scores = scores.masked_fill(age < 0, -math.inf)
    weights = scores.softmax(-1)
    y = (weights * near) @ near_value + (weights * ~near) @ far_value
    return y.transpose(1, 2), None


def settings() -> dict[str, Parts]:
    """Return what is measured, by its name."""
    found = {"KV16": Parts()}
    for args in (KVCacheArgs(num_bits=8), KVCacheArgs(num_bits=4)):
        name = f"KV{args.num_bits}"
        plain = args.model_copy(update={"hadamard": False})
        found |= {name: Parts(args), f"{name}, no rotation": Parts(plain)}
        found |= {f"{name}, first {n} tokens": Parts(args, first=n) for n in (1, 4)}
        found |= {f"{name}, last {n} tokens": Parts(args, recent=n) for n in (16, 64)}
        found |= {f"{name}, first and last block": Parts(args, blocks=1)}
        found |= {f"{name}, first 4 and last 64 tokens": Parts(args, first=4, recent=64)}
    return found


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path), default=BOOKS)
@click.option("--windows", type=click.IntRange(1), default=16, show_default=True, help="Windows of 256 tokens.")
@click.option("--cache", "labels", type=click.Choice(list(settings())), multiple=True, help="Only these caches.")
def main(model: Path, windows: int, labels: tuple[str, ...]) -> None:
    """Print one table, and the increase over its first row."""
    samples = read_samples(TEXT, WINDOW, windows, load_tokenize(model), 2**31)
    batches = [batch["input_ids"] for batch in samples.batches(BATCH)]
    reference, changed = (open_checkpoint(model).load() for _ in range(2))
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    for config in configs(changed):
        config._attn_implementation = {"": NAME}
    table = Table("in floating point", "nats/token", "increase", "KL", box=SIMPLE_HEAD, pad_edge=False)
    base = None
    for label in labels or settings():
        AttentionInterface.register(NAME, functools.partial(attend, parts=settings()[label]))
        found = score_language(changed, batches, reference)
        base = found.loss if base is None else base
        table.add_row(label, f"{found.loss:.4f}", f"{found.loss - base:+.4f}", f"{found.kl:.5f}")
    Console().print(table)


if __name__ == "__main__":
    main()
