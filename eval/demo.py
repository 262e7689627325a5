"""`make demo` compares every scheme, rounded plainly and by its default recipe, on an easy and a hard model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from quantize.calibration.data import read_samples
from quantize.checkpoint.checkpoint import open_checkpoint
from quantize.checkpoint.tokenizer import load_tokenize
from quantize.eval.perplexity import score_language
from quantize.eval.planted_outliers import plant
from quantize.eval.report import stored_bytes
from quantize.formats import FORMATS
from quantize.pipeline.quantize import quantize_model
from quantize.scheme.scheme import SCHEME_NAMES

TESTS = Path(__file__).resolve().parents[1] / "tests"
MODEL, TEXT = TESTS / "models" / "books-llama-6m", TESTS / "data" / "books" / "heldout.txt"
WINDOW, WINDOWS, BATCH = 256, 64, 16
ROUND_TO_NEAREST = {"passes": [], "quantizer": {"name": "rtn"}, "weights": {"symmetric": True}}
PLAIN_ACTIVATIONS = {"activations": {"symmetric": True, "clip_ratio": 1.0}}


def main() -> None:
    """Quantize the bundled model and its planted twin with every scheme and print one table."""
    console = Console()
    table = Table(
        "model",
        "scheme",
        "recipe",
        "nats/token",
        "increase",
        "KL",
        "top-1",
        "bytes",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    with tempfile.TemporaryDirectory() as scratch:
        twin = Path(scratch) / "planted"
        plant(MODEL, twin)
        for name, model in (("as it is", MODEL), ("planted", twin)):
            for row in rows(model, Path(scratch) / name, console):
                table.add_row(name, *row)
            table.add_section()
    console.print(f"{MODEL.name}, integer weights per channel, {WINDOWS} windows of {WINDOW} unseen tokens")
    console.print(table)


def rows(model: Path, scratch: Path, console: Console) -> Iterator[tuple[str, ...]]:
    """Yield one row for the float model and then two for each scheme."""
    samples = read_samples(TEXT, WINDOW, WINDOWS, load_tokenize(model), 2**31)
    batches = [batch["input_ids"] for batch in samples.batches(BATCH)]
    reference = open_checkpoint(model).load()
    base = score_language(reference, batches).loss
    yield "float", "", f"{base:.4f}", "", "", "", f"{stored_bytes(model):,}"
    for scheme in SCHEME_NAMES:
        plain = ROUND_TO_NEAREST | ({} if scheme == "W4A16" else PLAIN_ACTIVATIONS)
        for label, recipe in (("RTN", plain), ("default", {})):
            console.print(f"{scratch.name}: {scheme} {label}", style="dim")
            yield scheme, label, *measured(model, scheme, recipe, scratch / scheme / label, reference, base, batches)


def measured(
    model: Path,
    scheme: str,
    recipe: dict[str, Any],
    output: Path,
    reference: nn.Module,
    base: float,
    batches: list[Tensor],
) -> tuple[str, ...]:
    """Return the figures of one artifact, loaded back from its directory."""
    group_size = None if scheme.lower() in FORMATS else 0
    artifact = quantize_model(
        model, scheme=scheme, output_dir=output, recipe=recipe, group_size=group_size, seqlen=WINDOW
    )
    found = score_language(artifact.load(), batches, reference)
    size = f"{stored_bytes(artifact.directory):,}"
    return f"{found.loss:.4f}", f"{found.loss - base:+.4f}", f"{found.kl:.4f}", f"{found.top1:.3f}", size


if __name__ == "__main__":
    main()
