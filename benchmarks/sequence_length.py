"""`make bench-lengths` measures how ranges of activations depend on sequence length, and what another length costs.

Sequence-length-aware calibration (SLAC, Lee et al. 2023, arXiv 2311.05161, section 3.2) takes sequences as long as
those for which the model will be used (`--seqlen`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from quantize.calibration.data import BUNDLED, read_samples
from quantize.checkpoint.opening import open_checkpoint
from quantize.checkpoint.tokenizer import load_tokenize
from quantize.eval.divergence import LanguageJudge
from quantize.eval.planted_outlier_kinds import inputs_of
from quantize.graph.export import export_program
from quantize.pipeline.quantize import quantize_model

TESTS = Path(__file__).resolve().parents[1] / "tests"
MODEL, TEXT = TESTS / "models" / "books-llama-6m", TESTS / "data" / "books" / "heldout.txt"
LENGTHS, TOKENS, DEPLOYED = (32, 64, 128, 256, 512), 8192, 512


def main() -> None:
    """Print a row for each calibration length, with the same number of tokens in each."""
    console, judge = Console(), LanguageJudge(MODEL, TEXT, DEPLOYED, TOKENS // DEPLOYED)
    table = Table("calibration length", "range", "largest range", "W4A8 AQAS", "W4A4 default", box=SIMPLE_HEAD)
    deployed = ranges(DEPLOYED)
    for length in LENGTHS:
        ratio = ranges(length) / deployed
        losses = (
            judge.scores(quantized(scheme, recipe, length))["increase"]
            for scheme, recipe in (("W4A8", {"passes": [{"name": "aqas"}]}), ("W4A4", {}))
        )
        table.add_row(f"{length}", f"{ratio.mean():.3f}", f"{ratio.max():.3f}", *(f"{loss:+.4f}" for loss in losses))
    console.print(
        f"{MODEL.name} used at length {DEPLOYED}; ranges of inputs of linears as a part of those at {DEPLOYED}"
    )
    console.print(table)


def ranges(length: int) -> torch.Tensor:
    """Return the largest magnitude of each linear's input, [linears], on the same text in windows of some length."""
    checkpoint = open_checkpoint(MODEL)
    program = export_program(checkpoint.skeleton())
    weights = {name: checkpoint.tensor(name).float() for name in program.parameters.values()}
    samples = read_samples(BUNDLED, length, TOKENS // length, load_tokenize(MODEL), program.vocabulary)
    seen = inputs_of(program, weights, [row["input_ids"] for row in samples.batches(TOKENS // length)])
    return torch.stack([x.abs().amax() for x in seen.values()])


def quantized(scheme: str, recipe: Mapping[str, object], length: int) -> torch.nn.Module:
    """Quantize the model with calibration data of one length."""
    with tempfile.TemporaryDirectory() as scratch:
        artifact = quantize_model(
            MODEL, scheme=scheme, recipe=recipe, output_dir=Path(scratch) / "out", group_size=0, seqlen=length,
            nsamples=TOKENS // length,
        )  # fmt: skip
        return artifact.load()


if __name__ == "__main__":
    main()
