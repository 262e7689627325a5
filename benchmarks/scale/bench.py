"""Random models of known shapes are quantized at several depths, and time and peak memory are measured.

The tables are in `benchmarks/results/scale-KIND.md`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from benchmarks.machine import Processor, processor
from benchmarks.scale.bound import verdict
from benchmarks.scale.model import SHAPES, write_model, write_tokens
from quantize.calibration.precision import bfloat16_unit

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("peer.py")
# The second peer is for CPUs without bfloat16 products, on which the first takes several times as long.
PEERS = ("llm-compressor gptq", "llm-compressor gptq, float32")
METHODS = ("rtn", "rtn in turn", "gptq", "gptq-plain", "gptaq")
Row = dict[str, Any]
RUNS = """# Time and memory against depth (`make bench-scale`)

{machine}.

Random Llamas in bf16, to W4A16 symmetric in groups of 128. Seconds on the clock, of the CPU, and of the CPU for each
billion parameters; the peak of resident memory in MB of 10⁶ bytes, with the interpreter and its libraries, which alone
take what the column behind says. `in turn` reads, rounds and writes one block after the other, where all others read
the next block and write the last one meanwhile. `gptq` fits scales and sweeps twice; `gptq-plain` is GPTQ as other
tools run it. The last columns are what `--dry-run` foresees of the same run.

| size | layers | method | s | CPU s | CPU s / 10⁹ | peak MB | interpreter MB | artifact MB | foreseen s | MB | MB |
|---|---|---|---|---|---|---|---|---|---|---|---|"""
PHASES = """Phases; the last column is the part of the speed of a float32 matrix product, measured in the same process,
that the products of the phase reach in a CPU second.

| size | layers | method | phase | s | CPU s | cores | GFLOP | of GEMM |
|---|---|---|---|---|---|---|---|---|"""


def bench(
    size: str, layers: int, methods: tuple[str, ...], samples: int, seqlen: int, peer: str | None, folder: Path
) -> list[Row]:
    """Quantize one model by each method in a process of its own, and by the peer, if there is one."""
    model, tokens = folder / "model", folder / "tokens.jsonl"
    parameters = write_model(model, size, layers)
    write_tokens(tokens, size, samples, seqlen)
    rows = []
    ours = [sys.executable, "-m", "benchmarks.scale.run"]
    commands = dict.fromkeys(methods, ours)
    if peer:
        peers = PEERS[:1] if bfloat16_unit() != "none" else PEERS
        commands |= {"gptq-plain": ours} | {name: [peer, str(SCRIPT)] for name in peers}
    for name, command in commands.items():
        arguments = [model, tokens, folder / "out", name, samples, seqlen]
        found = measured([*command, *map(str, arguments)])
        foreseen = {} if name in PEERS else measured([*ours, "--foresee", *map(str, (*arguments[:2], *arguments[3:]))])
        rows.append({"size": size, "layers": layers, "method": name, "parameters": parameters, **found})
        rows[-1]["foreseen"] = foreseen
        shutil.rmtree(folder / "out", ignore_errors=True)
        click.echo(line(rows[-1]))
    if peer:
        command = [sys.executable, "-m", "benchmarks.scale.bound", str(model), str(tokens)]
        next(row for row in rows if row["method"] == "gptq-plain")["bound"] = measured(command)
    shutil.rmtree(model)
    return rows


def measured(command: list[str]) -> Row:
    """Return the last line that a run prints, read as JSON; its errors are shown as they are."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def line(row: Row) -> str:
    """Return a row of the table of runs."""
    billions = row["parameters"] / 1e9
    cells = [row["size"], row["layers"], row["method"], f"{row['seconds']:.1f}", f"{row['cpu']:.1f}",
             f"{row['cpu'] / billions:.1f}", f"{row['peak_mb']:.0f}", f"{row['interpreter_mb']:.0f}",
             f"{row['artifact_mb']:.0f}"]  # fmt: skip
    cells += [f"{row['foreseen'][name]:.0f}" for name in ("seconds", "peak_mb", "artifact_mb") if row["foreseen"]]
    return "| " + " | ".join(map(str, cells)) + " |"


def phase_lines(row: Row) -> list[str]:
    """Return rows of the table of phases, with the part of the product's speed that each phase reaches."""
    lines = []
    for name, phase in sorted(row["phases"].items(), key=lambda item: -item[1]["cpu"]):
        cpu, seconds = max(phase["cpu"], 1e-9), max(phase["seconds"], 1e-9)
        part = f"{phase['flops'] / cpu / row['gemm_cpu']:.0%}" if phase["flops"] else ""
        lines.append(
            f"| {row['size']} | {row['layers']} | {row['method']} | {name} | {seconds:.1f} | {cpu:.1f} | "
            f"{cpu / seconds:.2f} | {phase['flops'] / 1e9:.0f} | {part} |"
        )
    return lines


def report(rows: list[Row], machine: Processor) -> str:
    """Return the tables as Markdown."""
    runs = [RUNS.format(machine=machine), *map(line, rows), ""]
    phases = [PHASES, *(text for row in rows if "phases" in row for text in phase_lines(row)), ""]
    return "\n".join([*runs, *filter(None, [verdict(rows, PEERS[0])]), *phases])


@click.command()
@click.option("--size", "sizes", type=click.Choice(list(SHAPES)), multiple=True, default=("1.1B",), show_default=True)
@click.option("--layers", type=int, multiple=True, default=(4, 8, 16), show_default=True)
@click.option("--method", "methods", type=click.Choice(METHODS), multiple=True, default=METHODS[:3])
@click.option("--samples", default=16, show_default=True, help="Calibration windows.")
@click.option("--seqlen", default=512, show_default=True, help="Tokens in each.")
@click.option("--peer", help="Python with llm-compressor, to run its GPTQ on the deepest model.")
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "benchmarks/results", show_default=True)
def main(
    sizes: tuple[str, ...], layers: tuple[int, ...], methods: tuple[str, ...], samples: int, seqlen: int,
    peer: str | None, output: Path,
) -> None:  # fmt: skip
    """Make each model, quantize it, and write scale-KIND.md and .json, a file for each kind of processor."""
    rows: list[Row] = []
    for size in sizes:
        for depth in layers:
            with tempfile.TemporaryDirectory(dir=output) as folder:
                rows += bench(
                    size, depth, methods, samples, seqlen, peer if depth == max(layers) else None, Path(folder)
                )
    here = processor()
    (output / f"scale-{here.kind}.json").write_text(json.dumps(rows, indent=2) + "\n")
    (output / f"scale-{here.kind}.md").write_text(report(rows, here))


if __name__ == "__main__":
    main()
