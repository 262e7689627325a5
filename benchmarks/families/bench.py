"""`make bench-families` quantizes a tiny model of every family: benchmarks/results/families.json, docs/families.md."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click

from benchmarks.families.families import FAMILIES
from benchmarks.families.report import markdown
from benchmarks.families.run import CRASH, SCHEMES
from benchmarks.families.run import main as measure
from benchmarks.models.cells import DEFAULT, ROOT

Row = dict[str, Any]
WALL = 1800  # seconds after which a family that does not even use its processor time is ended


def measured(name: str, onnx: bool) -> Row:
    """Return the row of one family, which is measured in a process of its own."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    row: Row = {"family": name, "commit": commit.stdout.strip()}
    context = get_context("forkserver")  # a process that has imported everything, of which each family gets a copy
    context.set_forkserver_preload(["benchmarks.families.run"])
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        process = context.Process(target=measure, args=(name, Path(scratch), result, onnx))
        process.start()
        process.join(WALL)
        if process.is_alive():
            process.kill()
            process.join()
        if result.is_file():
            row |= json.loads(result.read_text())
            return row
    return row | {"quantized": f"{CRASH}the process ended with code {process.exitcode}"}


def finished(row: Row) -> bool:
    """Return whether a row has all its cells, or no artifact that could be exported."""
    return "onnx" in row or not isinstance(row.get(f"{SCHEMES[0]} {DEFAULT}"), float)


@click.command()
@click.option("--family", "names", type=click.Choice(FAMILIES), multiple=True, help="Measure these, known or not.")
@click.option("--no-onnx", is_flag=True, help="Leave the export to ONNX, which takes most of the time, to a later run.")
def main(names: tuple[str, ...], no_onnx: bool) -> None:
    """Measure the families that families.json lacks, and write it and the table after each."""
    path = ROOT / "benchmarks" / "results" / "families.json"
    rows: dict[str, Row] = {row["family"]: row for row in json.loads(path.read_text())} if path.is_file() else {}
    left = list(names) or [name for name in FAMILIES if name not in rows or not (no_onnx or finished(rows[name]))]
    start = time.perf_counter()
    for done, name in enumerate(left, 1):
        rows[name] = measured(name, not no_onnx)
        found = [rows[name] for name in FAMILIES if name in rows]
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        (ROOT / "docs" / "families.md").write_text(markdown(found))
        minutes = (time.perf_counter() - start) / done * (len(left) - done) / 60
        click.echo(f"{name}: {done} of {len(left)} families, {minutes:.0f} minutes left", err=True)


if __name__ == "__main__":
    main()
