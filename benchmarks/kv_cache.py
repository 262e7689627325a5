"""`python -m benchmarks.kv_cache` measures what a quantized KV cache costs, with and without rotated keys, at W4A4."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from quantize.calibration.data import read_samples
from quantize.checkpoint.opening import open_checkpoint
from quantize.checkpoint.tokenizer import load_tokenize
from quantize.eval.perplexity import score_language
from quantize.eval.planted_outliers import plant, plant_keys
from quantize.nn.attention import has_kv_cache, set_kv_cache
from quantize.nn.packed_cache import packed_cache
from quantize.pipeline.quantize import quantize_model
from quantize.scheme.scheme import KVCacheArgs

TESTS = Path(__file__).resolve().parents[1] / "tests"
BOOKS, STORIES = TESTS / "models" / "books-llama-6m", TESTS / "models" / "stories260K"
TEXTS = {BOOKS: TESTS / "data" / "books" / "heldout.txt", STORIES: TESTS / "data" / "stories260K" / "dev.jsonl"}
CALIBRATION = {BOOKS: None, STORIES: TESTS / "data" / "stories260K" / "calibration.jsonl"}
WINDOW, WINDOWS, BATCH = 256, 64, 16
SETTINGS = {
    "KV16": None,
    "KV8": KVCacheArgs(num_bits=8, hadamard=False),
    "KV8 rotated": KVCacheArgs(num_bits=8),
    "K8 V4 rotated": KVCacheArgs(num_bits=8, value_bits=4),
    "K4 V8 rotated": KVCacheArgs(num_bits=4, value_bits=8),
    "KV4": KVCacheArgs(num_bits=4, hadamard=False),
    "KV4 rotated": KVCacheArgs(num_bits=4),
    "KV4 rotated, clip 0.95": KVCacheArgs(num_bits=4, clip_ratio=0.95),
}


def main() -> None:
    """Quantize two small models and their twins with planted outliers, and print one table."""
    console = Console()
    table = Table("model", "cache", "bytes a token", "nats/token", "increase", "KL", box=SIMPLE_HEAD, pad_edge=False)
    with tempfile.TemporaryDirectory() as scratch:
        for name, source, model in twins(Path(scratch)):
            console.print(name, style="dim")
            for row in rows(source, model, Path(scratch) / "artifacts" / name):
                table.add_row(name, *row)
            table.add_section()
    console.print(f"W4A4 by default, per-channel weights, at most {WINDOWS} windows of {WINDOW} unseen tokens")
    console.print(table)


def twins(scratch: Path) -> Iterator[tuple[str, Path, Path]]:
    """Yield a name, the model, and either it or its twin with planted outliers."""
    yield BOOKS.name, BOOKS, BOOKS
    yield STORIES.name, STORIES, STORIES
    plant(BOOKS, scratch / "planted")
    yield "planted", BOOKS, scratch / "planted"
    plant_keys(BOOKS, scratch / "planted-keys")
    yield "planted keys", BOOKS, scratch / "planted-keys"


def rows(source: Path, model: Path, output: Path) -> Iterator[tuple[str, ...]]:
    """Yield a row for each setting of the cache, all of an artifact whose cache was in floating point."""
    samples = read_samples(TEXTS[source], WINDOW, WINDOWS, load_tokenize(source), 2**31)
    batches = [batch["input_ids"] for batch in samples.batches(BATCH)]
    reference = open_checkpoint(model).load()
    base = score_language(reference, batches).loss
    artifact = quantize_model(
        model, scheme="W4A4", output_dir=output, calibration=CALIBRATION[source], group_size=0, seqlen=WINDOW
    )
    quantized = artifact.load()
    for label, cache in SETTINGS.items():
        set_kv_cache(quantized, cache)
        found = score_language(quantized, batches, reference)
        yield (
            label,
            f"{held_bytes(quantized, batches[0]):.0f}",
            f"{found.loss:.4f}",
            f"{found.loss - base:+.4f}",
            f"{found.kl:.4f}",
        )


@torch.no_grad()
def held_bytes(model: PreTrainedModel, ids: Tensor) -> float:
    """Return the bytes that a cache holds of a token, packed if keys and values are quantized."""
    cache = packed_cache(model) if has_kv_cache(model) else DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    held = [rows for layer in cache.layers for rows in (layer.keys, layer.values)]
    return float(sum(rows.nbytes for rows in held)) / ids.numel()


if __name__ == "__main__":
    main()
