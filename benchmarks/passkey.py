"""`python -m benchmarks.passkey MODEL` hides a number in a long text and asks for it, with KV caches of few bits.

The weights of MODEL stay in floating point. The cache is packed, so that what is read is what is stored.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, PreTrainedModel

from quantize.calibration.data import BUNDLED
from quantize.checkpoint.opening import open_checkpoint
from quantize.checkpoint.tokenizer import load_tokenizer
from quantize.nn.attention import set_kv_cache
from quantize.nn.packed_cache import packed_cache
from quantize.scheme.scheme import KVCacheArgs

SETTINGS = {
    "KV16": None,
    "KV8": KVCacheArgs(num_bits=8),
    "K8 V4": KVCacheArgs(num_bits=8, value_bits=4),
    "KV4": KVCacheArgs(num_bits=4),
    "KV4, last 64 tokens in float": KVCacheArgs(num_bits=4, residual_length=64),
    "KV4, no rotation": KVCacheArgs(num_bits=4, hadamard=False),
}
KEYS, NEW = ("71432", "30958", "86217"), 8  # one for each place in the text, and tokens of an answer
NEEDLE, QUESTION = "\nThe pass key is {}. Remember it: {} is the pass key.\n", "\nWhat is the pass key? The pass key is"


@torch.no_grad()
def answer(model: PreTrainedModel, ids: list[int], args: KVCacheArgs | None) -> list[int]:
    """Return the most likely tokens behind a text."""
    set_kv_cache(model, args)
    cache = DynamicCache(config=model.config) if args is None else packed_cache(model)
    given, found = torch.tensor([ids]), list[int]()
    for _ in range(NEW):
        given = model(given, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
        found.append(int(given))
    return found


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--tokens", type=click.IntRange(64), default=4096, show_default=True, help="Tokens of a text.")
@click.option("--cache", "labels", type=click.Choice(list(SETTINGS)), multiple=True, help="Only these caches.")
def main(model: Path, tokens: int, labels: tuple[str, ...]) -> None:
    """Print how many of the numbers are found with each cache."""
    tokenizer, loaded = load_tokenizer(model), open_checkpoint(model).load()
    assert tokenizer is not None

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    prose, question = encode(BUNDLED.read_text()[: 8 * tokens]), encode(QUESTION)
    table = Table("cache", "found", "answers", box=SIMPLE_HEAD, pad_edge=False)
    for label in labels or SETTINGS:
        args, answers = SETTINGS[label], []
        for place, key in enumerate(KEYS, 1):
            needle = encode(NEEDLE.format(key, key))
            left = tokens - len(needle) - len(question)
            cut = left * place // (len(KEYS) + 1)
            ids = [*prose[:cut], *needle, *prose[cut:left], *question]
            answers.append(tokenizer.decode(answer(loaded, ids, args)))
        found = sum(key in text for key, text in zip(KEYS, answers, strict=True))
        table.add_row(label, f"{found} of {len(KEYS)}", "; ".join(map(repr, answers)))
        click.echo(f"{label}: {found} of {len(KEYS)}", err=True)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
