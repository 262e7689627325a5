"""Random shards are rounded without the model's code, here and by llm-compressor, in processes of their own."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from benchmarks.machine import Processor, processor
from benchmarks.scale.bench import ROOT, measured
from benchmarks.scale.model import SHAPES, write_model

SCRIPT = Path(__file__).with_name("peer.py")
HEAD = """# Rounding without the model's code (`make bench-model-free`)

{machine}.

A random Llama in bf16, one layer a file, to W4A16 symmetric in groups of 128 as compressed-tensors. Seconds on the
clock and of the CPU, and the peak of resident memory in MB of 10⁶ bytes, with the interpreter and its libraries, which
alone take what the last column says.

| size | layers | GB | scales | tool | s | CPU s | peak MB | interpreter MB |
|---|---|---|---|---|---|---|---|---|"""
SCALES = {"minmax": "minima and maxima", "mse": "searched"}
Row = dict[str, Any]


def bench(size: str, layers: int, searches: tuple[str, ...], peer: str | None, folder: Path) -> list[Row]:
    """Round one model in each way by each tool."""
    model, rows = folder / "model", list[Row]()
    billions = 2 * write_model(model, size, layers) / 1e9
    tools = {"this": [sys.executable, "-m", "benchmarks.model_free.run"]}
    tools |= {"llm-compressor": [peer, str(SCRIPT)]} if peer else {}
    for search in searches:
        for tool, command in tools.items():
            found = measured([*command, str(model), str(folder / "out"), search])
            rows.append({"size": size, "layers": layers, "gb": billions, "scales": search, "tool": tool, **found})
            click.echo(line(rows[-1]))
            shutil.rmtree(folder / "out")
    return rows


def line(row: Row) -> str:
    """Return a row of the table."""
    figures = [f"{row[name]:.1f}" for name in ("seconds", "cpu")]
    figures += [f"{row[name]:.0f}" for name in ("peak_mb", "interpreter_mb")]
    cells = [row["size"], str(row["layers"]), f"{row['gb']:.1f}", SCALES[row["scales"]], row["tool"], *figures]
    return f"| {' | '.join(cells)} |"


def report(rows: list[Row], machine: Processor) -> str:
    """Return the table as Markdown."""
    return "\n".join([HEAD.format(machine=machine), *map(line, rows), ""])


@click.command()
@click.option("--size", type=click.Choice(list(SHAPES)), default="1.1B", show_default=True)
@click.option("--layers", default=16, show_default=True)
@click.option("--scales", "searches", type=click.Choice(list(SCALES)), multiple=True, default=("minmax",))
@click.option("--peer", help="Python with llm-compressor.")
@click.option("--scratch", type=click.Path(path_type=Path, exists=True), help="Where the model is written.")
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "benchmarks/results", show_default=True)
def main(
    size: str, layers: int, searches: tuple[str, ...], peer: str | None, scratch: Path | None, output: Path
) -> None:
    """Make a model, round it, and write model-free-KIND.md and .json, a file for each kind of processor."""
    with tempfile.TemporaryDirectory(dir=scratch or output) as folder:
        rows = bench(size, layers, searches, peer, Path(folder))
    here = processor()
    (output / f"model-free-{here.kind}.json").write_text(json.dumps(rows, indent=2) + "\n")
    (output / f"model-free-{here.kind}.md").write_text(report(rows, here))


if __name__ == "__main__":
    main()
