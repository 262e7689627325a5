"""`make bench-models` quantizes real models to every scheme: benchmarks/results/models.json and models.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from benchmarks.machine import processor
from benchmarks.models.cells import (
    DEFAULT,
    FLOAT,
    MODELS,
    PEERS,
    PLAIN,
    ROOT,
    SCHEMES,
    TUNED,
    Cell,
    Row,
    cells_of,
    missing,
    position,
)  # fmt: skip
from benchmarks.models.report import markdown
from benchmarks.models.windows import write_calibration, write_evaluation

TEXT = ROOT / "tests" / "data" / "books" / "heldout.txt"


def measured(cells: Sequence[Cell], directory: Path, texts: list[Path], peer: str | None) -> Iterator[Row]:
    """Yield a row for each cell of one model, which are measured in turn, each in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        model, data = MODELS[cells[0].model], Path(scratch)
        write_calibration(directory, data / "calibration.jsonl", *model.calibration)
        if model.language:
            write_evaluation(directory, data / "evaluation.json", texts)
        for number, cell in enumerate(cells):
            python, script = (peer, "peer") if cell.recipe in PEERS else (sys.executable, "run")
            paths = (directory, data, data / str(number))
            found = run_command([str(python), "-m", f"benchmarks.models.{script}", *cell, *map(str, paths)])
            yield {**cell._asdict(), **found, "machine": str(processor())}


def run_command(command: Sequence[str]) -> Row:
    """Return the last line that a process prints, read as JSON, or `error`, one line on why it printed none."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode < 0:
        return {"error": f"ended by signal {-done.returncode}"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1]}
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def chosen(names: tuple[str, ...], schemes: tuple[str, ...], recipes: tuple[str, ...], peer: bool) -> list[Cell]:
    """Return the cells to be measured; the float model's always, because increases are counted from its loss."""
    found = [name for name in MODELS if not names or any(part.lower() in name.lower() for part in names)]
    if not found:
        raise click.UsageError(f"--model {' '.join(names)} is part of no model's name; known are {', '.join(MODELS)}")
    return [
        cell
        for name in found
        for cell in cells_of(name, peer)
        if cell.scheme == FLOAT or ((not schemes or cell.scheme in schemes) and (not recipes or cell.recipe in recipes))
    ]


@click.command()
@click.option("--model", "names", multiple=True, help="A part of a model's name.  [default: all]")
@click.option("--scheme", "schemes", type=click.Choice(SCHEMES), multiple=True, help="[default: all]")
@click.option("--recipe", "recipes", type=click.Choice([PLAIN, DEFAULT, TUNED, *PEERS]), multiple=True,
              help="[default: all]")  # fmt: skip
@click.option("--models-dir", type=click.Path(path_type=Path), help="Where benchmarks/models/gguf_to_hf.py put models.")
@click.option("--text", type=click.Path(exists=True, path_type=Path), help="A second .txt to score on.")
@click.option("--peer", help="Python of an environment with what benchmarks/models/peer.py names.")
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "benchmarks/results", show_default=True)
def main(
    names: tuple[str, ...], schemes: tuple[str, ...], recipes: tuple[str, ...], models_dir: Path | None,
    text: Path | None, peer: str | None, output: Path,
) -> None:  # fmt: skip
    """Measure what models.json lacks, one cell after the other, and write it and models.md after each."""
    path, texts = output / "models.json", [TEXT, text] if text else [TEXT]
    rows: list[Row] = json.loads(path.read_text()) if path.is_file() else []
    left = missing(rows, chosen(names, schemes, recipes, peer is not None), [text.stem for text in texts])
    directories = {name: MODELS[name].directory(models_dir) for name in dict.fromkeys(cell.model for cell in left)}
    for name in (name for name, directory in directories.items() if directory is None):
        click.echo(
            f"{name} is skipped: --models-dir holds no {MODELS[name].folder}; docs/measurements.md says how to make it"
        )
    left, start, done = [cell for cell in left if directories[cell.model]], time.perf_counter(), 0
    for name, directory in directories.items():
        wanted = [cell for cell in left if cell.model == name]
        for row in measured(wanted, directory, texts, peer) if directory and wanted else ():
            rows = sorted([other for other in rows if position(other) != position(row)] + [row], key=position)
            path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
            (output / "models.md").write_text(markdown(rows))
            done += 1
            minutes = (time.perf_counter() - start) / done * (len(left) - done) / 60
            what = " ".join([row["model"], row["scheme"], row["recipe"], row.get("error", "")]).strip()
            click.echo(f"{what}: {done} of {len(left)} cells, {minutes:.0f} minutes left", err=True)


if __name__ == "__main__":
    main()
