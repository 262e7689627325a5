"""`make bench-mixture` measures a trained mixture in every scheme: benchmarks/results/mixture.json and mixture.md."""

from __future__ import annotations

import functools
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from benchmarks.machine import processor
from benchmarks.mixture.cells import (
    DROPPED,
    FLOAT,
    FREQUENCY,
    NSAMPLES,
    RANDOM,
    RATIOS,
    REAP,
    SEQLEN,
    Cell,
    Row,
    changes,
    missing,
    position,
)
from benchmarks.mixture.report import markdown
from benchmarks.mixture.text import ROOT, unseen_windows
from quantize.checkpoint.opening import open_checkpoint
from quantize.eval.demo import ROUND_TO_NEAREST
from quantize.eval.divergence import Recorded
from quantize.eval.perplexity import score_language
from quantize.pipeline.context import RunContext
from quantize.pipeline.prepare import Prepared, prepare
from quantize.pipeline.prune import Pruning
from quantize.pipeline.quantize import Artifact, quantize_model
from quantize.pipeline.steps.expert_saliency import Saliency, collect_saliency
from quantize.pipeline.steps.experts import FEW
from quantize.recipe.recipe import load_recipe

BATCH = 8  # windows


def measure(cell: Cell, directory: Path, expected: Recorded, batches: Sequence[Tensor], output: Path) -> Row:
    """Return the scores of one cell, with what the manifest says of the experts.

    Args:
        cell: the cell.
        directory: the float mixture.
        expected: what the float mixture returns for the batches of unseen tokens.
        batches: these batches.
        output: where the artifact is written.
    """
    if cell.scheme == FLOAT:
        parameters = sum(x.numel() for x in open_checkpoint(directory).skeleton().parameters())
        return {"loss": score_language(expected, batches).loss, "parameters": parameters}
    if cell.scheme == DROPPED:
        return scores(pruned(cell, directory), expected, batches)
    start = time.process_time()
    artifact = quantize_model(directory, output_dir=output, scheme=cell.scheme, recipe=changes(cell), seed=cell.seed,
                              seqlen=SEQLEN, group_size=0)  # fmt: skip
    seconds = time.process_time() - start
    return scores(artifact.load(), expected, batches) | {"seconds": seconds} | experts(artifact)


def scores(model: nn.Module, expected: Recorded, batches: Sequence[Tensor]) -> dict[str, float | None]:
    """Return the loss in nats per token, and `kl` and `top1` against the float model."""
    found = score_language(model, batches, expected)
    return {"loss": found.loss, "kl": found.kl, "top1": found.top1}


def experts(artifact: Artifact) -> dict[str, Any]:
    """Return how many linears the stacks hold, how few tokens one saw, and how many were rounded plainly after all."""
    tokens: Mapping[str, Sequence[int]] = artifact.manifest.get("expert_tokens", {})
    stacks = list(tokens.values())
    columns = {path: entry["columns"] for path, entry in artifact.manifest["quantization"]["modules"].items()}
    plainly = artifact.manifest.get("held_out", {}).get("rounded_plainly", [])
    return {
        "experts": sum(map(len, stacks)),
        "rare": sum(count < FEW * columns[path] for path, counts in tokens.items() for count in counts),
        "fewest_tokens": min((min(counts) for counts in stacks), default=0),
        "rounded_plainly": sum(path.rpartition(".")[0] in tokens for path in plainly),
    }


@functools.cache
def saliency(directory: Path) -> tuple[Prepared, Saliency]:
    """Return the float mixture as a run prepares it, and what the calibration data say of its experts."""
    recipe = load_recipe("W4A16", ROUND_TO_NEAREST, nsamples=NSAMPLES, seqlen=SEQLEN, group_size=0)
    prepared = prepare(directory, recipe, None)
    return prepared, collect_saliency(prepared, RunContext())


def pruned(cell: Cell, directory: Path) -> nn.Module:
    """Return the float mixture without some experts of each layer: those of the least saliency, or one of its twins."""
    share, by = cell.recipe.split(", ")
    prepared, found = saliency(directory)
    generator = torch.Generator().manual_seed(cell.seed)
    scores = {
        REAP: {path: found.scores(path) for path in found.tokens},
        FREQUENCY: {path: torch.tensor(tokens) for path, tokens in found.tokens.items()},
        RANDOM: {path: torch.rand(len(tokens), generator=generator) for path, tokens in found.tokens.items()},
    }
    pruning = Pruning.of(prepared, RATIOS[share])
    return pruning.checkpoint(prepared, pruning.kept(scores[by])).load()


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "benchmarks/results", show_default=True)
def main(directory: Path, output: Path) -> None:
    """Measure what mixture.json lacks on the mixture in DIRECTORY, and write it and mixture.md after each cell."""
    path = output / "mixture.json"
    rows: list[Row] = json.loads(path.read_text()) if path.is_file() else []
    left, start = missing(rows), time.perf_counter()
    batches = list(unseen_windows().split(BATCH))
    expected = Recorded(open_checkpoint(directory).load(), batches)
    for done, cell in enumerate(left, 1):
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as scratch:
            row = cell._asdict() | measure(cell, directory, expected, batches, Path(scratch) / "artifact")
        rows = sorted([*rows, row | {"machine": str(processor())}], key=position)
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
        (output / "mixture.md").write_text(markdown(rows))
        minutes = (time.perf_counter() - start) / done * (len(left) - done) / 60
        click.echo(f"{' '.join(map(str, cell))}: {done} of {len(left)} cells, {minutes:.0f} minutes left", err=True)


if __name__ == "__main__":
    main()
