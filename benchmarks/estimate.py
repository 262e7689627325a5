"""What `--dry-run` estimates is compared with what a run takes; each run has its own process, and so its own peak."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.machine import processor
from benchmarks.scale.model import write_model, write_tokens
from quantize.pipeline.context import RunContext
from quantize.pipeline.distributed import SingleProcess
from quantize.pipeline.estimate.peak_memory import peak_memory
from quantize.pipeline.estimate.report import preflight
from quantize.pipeline.estimate.time import measure_time
from quantize.pipeline.prepare import identity_of, prepare
from quantize.pipeline.quantize import run_pipeline
from quantize.pipeline.resume.work_dir import ResumableWriter
from quantize.recipe.recipe import load_recipe

TOKENS = "tokens.jsonl"
MODELS = Path(__file__).resolve().parents[1] / "tests/models"
RUNS = (("stories260K", 32, 256), ("books-llama-6m", 32, 256), ("1.1B, 2 layers", 16, 512))
SCHEMES = ("W4A16", "W4A4")


def compare(model: Path, scheme: str, nsamples: int, seqlen: int) -> dict[str, Any]:
    """Return estimated and measured bytes and seconds of a run; memory includes what this process held before."""
    tokens = model / TOKENS if (model / TOKENS).exists() else None
    recipe = load_recipe(scheme, None, group_size=None if tokens else 0, nsamples=nsamples, seqlen=seqlen)
    prepared = prepare(model, recipe, tokens, read=False)
    found = preflight(prepared)
    held, disk = peak_memory(), found.artifact_bytes()
    foreseen: dict[str, float] = {"disk": disk, "held": held, "memory": held + found.memory_bytes()}
    foreseen["seconds"] = measure_time(found, 0.0).seconds
    with tempfile.TemporaryDirectory(dir=model.parent) as scratch:
        start, output = time.perf_counter(), Path(scratch, "out")
        with ResumableWriter(output) as writer:
            journal = writer.begin(identity_of(prepared), SingleProcess())
            run_pipeline(prepared, writer, RunContext(recipe.seed, scratch=writer.directory, journal=journal))
        seconds = time.perf_counter() - start
        page = {"report.html", "README.md"}  # which is as large for every model, and no program reads it
        files = (path for path in output.rglob("*") if path.is_file() and path.name not in page)
        figures = json.loads((output / "manifest.json").read_text())["report"]
        disk = sum(path.stat().st_size for path in files) - len(json.dumps(figures, indent=2))
    return {"foreseen": foreseen, "measured": {"disk": disk, "seconds": seconds, "memory": peak_memory()}}


def line(model: str, scheme: str, found: dict[str, Any]) -> str:
    """Return a row of the table, with each figure as estimated and as measured."""
    units = {"memory": 1e6, "disk": 1e6, "seconds": 1.0}
    pairs = [(found["foreseen"][name] / unit, found["measured"][name] / unit) for name, unit in units.items()]
    return "| " + " | ".join([model, scheme, *(f"{before:.1f} / {after:.1f}" for before, after in pairs)]) + " |"


def made(name: str, folder: Path) -> Path:
    """Return a bundled model, or make a random one of a shape and depth, with tokens to calibrate it on."""
    if (MODELS / name).exists():
        return MODELS / name
    size, layers = name.removesuffix(" layers").split(", ")
    write_model(folder / name, size, int(layers))
    write_tokens(folder / name / TOKENS, size, 16, 512)
    return folder / name


def main() -> None:
    """Print the table, or with arguments the JSON of one run."""
    if len(sys.argv) > 1:
        model, scheme, *sizes = sys.argv[1:]
        return print(json.dumps(compare(Path(model), scheme, *map(int, sizes))))
    click.echo(f"Foreseen / measured ({processor()}).\n\n| model | scheme | memory, MB | disk, MB | seconds |")
    click.echo("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=MODELS) as folder:
        for name, nsamples, seqlen in RUNS:
            found = made(name, Path(folder))
            for scheme in SCHEMES:
                arguments = [str(found), scheme, str(nsamples), str(seqlen)]
                command = [sys.executable, "-m", "benchmarks.estimate", *arguments]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                click.echo(line(name, scheme, json.loads(done.stdout)))


if __name__ == "__main__":
    main()
