"""`make demo` compares every scheme, rounded plainly and by its default recipe, on an easy and a hard model."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from quantize.calibration.data import read_samples
from quantize.checkpoint.opening import open_checkpoint
from quantize.checkpoint.tokenizer import load_tokenize
from quantize.eval.perplexity import score_language
from quantize.eval.planted_outliers import plant
from quantize.eval.report import stored_bytes
from quantize.formats import FORMATS
from quantize.pipeline.progress import track
from quantize.pipeline.quantize import quantize_model
from quantize.scheme.scheme import SCHEME_NAMES

TESTS = Path(__file__).resolve().parents[1] / "tests"
MODEL, TEXT = TESTS / "models" / "books-llama-6m", TESTS / "data" / "books" / "heldout.txt"
WINDOW, WINDOWS, BATCH = 256, 64, 16
ROUND_TO_NEAREST = {"passes": [], "quantizer": {"name": "rtn"}, "weights": {"symmetric": True}}
PLAIN_ACTIVATIONS = {"activations": {"symmetric": True, "clip_ratio": 1.0}}
ARTIFACTS = [(scheme, label) for scheme in SCHEME_NAMES for label in ("RTN", "default")]
HEADER = ("model", "scheme", "recipe", "nats/token", "increase", "KL", "top-1", "bytes")
MINUTES = "which takes about six minutes on two cores"


@dataclass(frozen=True)
class Demo:
    """A float model, the windows it is measured on, and its loss there in nats per token."""

    directory: Path
    model: nn.Module
    batches: list[Tensor]
    loss: float

    @classmethod
    def of(cls, directory: Path) -> Self:
        """Load and measure a model."""
        samples = read_samples(TEXT, WINDOW, WINDOWS, load_tokenize(directory), 2**31)
        batches = [batch["input_ids"] for batch in samples.batches(BATCH)]
        model = open_checkpoint(directory).load()
        return cls(directory, model, batches, score_language(model, batches).loss)

    def measured(self, scheme: str, recipe: dict[str, Any], output: Path) -> tuple[str, ...]:
        """Return the figures of one artifact, loaded back from its directory."""
        group_size = None if scheme.lower() in FORMATS else 0
        artifact = quantize_model(
            self.directory, scheme=scheme, output_dir=output, recipe=recipe, group_size=group_size, seqlen=WINDOW
        )
        found = score_language(artifact.load(), self.batches, self.model)
        size = f"{stored_bytes(artifact.directory):,}"
        return f"{found.loss:.4f}", f"{found.loss - self.loss:+.4f}", f"{found.kl:.4f}", f"{found.top1:.3f}", size


def main() -> None:
    """Quantize the bundled model and its planted twin with every scheme; print each result, and one table of all."""
    console, table = Console(), Table(*HEADER, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    console.print(f"{MODEL.name}, integer weights per channel, {WINDOWS} windows of {WINDOW} unseen tokens")
    console.print(f"{2 * len(ARTIFACTS)} artifacts are made and measured, {MINUTES}", soft_wrap=True)
    with tempfile.TemporaryDirectory() as scratch:
        twin = Path(scratch) / "planted"
        plant(MODEL, twin)
        models = {"as it is": Demo.of(MODEL), "planted": Demo.of(twin)}
        todo = [(name, *artifact) for name in models for artifact in ARTIFACTS]
        for name, scheme, label in track(todo, "measuring", " ".join, Console(stderr=True)):
            given = models[name]
            if (scheme, label) == ARTIFACTS[0]:
                table.add_section()
                table.add_row(name, "float", "", f"{given.loss:.4f}", "", "", "", f"{stored_bytes(given.directory):,}")
            row = given.measured(scheme, recipe_of(scheme, label), Path(scratch) / name / scheme / label)
            table.add_row(name, scheme, label, *row)
            console.print(f"{name}, {scheme} {label}: increase {row[1]}, KL {row[2]}, top-1 {row[3]}, {row[4]} bytes")
    console.print(table)


def recipe_of(scheme: str, label: str) -> dict[str, Any]:
    """Return what changes the scheme's recipe."""
    plain = ROUND_TO_NEAREST | ({} if scheme.endswith("A16") else PLAIN_ACTIVATIONS)
    return plain if label == "RTN" else {}


if __name__ == "__main__":
    main()
