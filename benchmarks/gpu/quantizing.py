"""`make bench-gpu-run` quantizes random Llamas on the GPU, and says where the time goes and what memory it takes.

A model of 8B or 70B shapes has two blocks here; what a block takes, times their number, is the time of a whole one.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.bench import PAGE, ROOT, between
from benchmarks.gpu.machine import describe, require_gpu
from benchmarks.scale.model import write_model, write_tokens
from benchmarks.scale.phases import Phases, watch
from benchmarks.scale.run import settings
from quantize.errors import UsageError
from quantize.pipeline.quantize import quantize_model

MARKS = ("<!-- gpu-run -->", "<!-- /gpu-run -->")
NOT_YET = "Not yet measured: no GPU was at hand. `make bench-gpu-run` measures, and writes this table."
SAMPLES, SEQLEN = 128, 2048
RUNS = {"1.1B": (16, 16), "8B": (2, 32), "70B": (2, 80)}  # the blocks that are run, and those of a whole model
GOALS = {"8B": 180, "70B": 900}  # seconds of a whole model
LAYER = re.compile(r"\blayers\.\d")  # in the name of a block that a whole model has more often


def main(*sizes: str) -> int:
    """Quantize a model of each size, write the results, and print them; return the exit code."""
    try:
        require_gpu()
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    phases, rows = watch(), list[dict[str, Any]]()
    for size in sizes or RUNS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measured(size, Path(folder), phases))
        print(json.dumps(rows[-1]), flush=True)
    write(ROOT, describe(ROOT) | {"runs": rows})
    return 0


def measured(size: str, folder: Path, phases: Phases) -> dict[str, Any]:
    """Quantize a model to W4A16 by GPTQ with default settings, and return seconds by phase and the peak of memory."""
    layers, whole = RUNS[size]
    parameters = write_model(folder / "model", size, layers, "cuda")
    write_tokens(folder / "tokens.jsonl", size, SAMPLES, SEQLEN)
    torch.cuda.reset_peak_memory_stats()
    phases.start()
    start = time.perf_counter()
    quantize_model(folder / "model", output_dir=folder / "out", scheme="W4A16", device="cuda",
                   recipe=settings(folder / "model", "gptq"), calibration=folder / "tokens.jsonl",
                   nsamples=SAMPLES, seqlen=SEQLEN)  # fmt: skip
    seconds = time.perf_counter() - start
    blocks = [end - begin for (name, begin), (_, end) in itertools.pairwise(phases.blocks) if LAYER.search(name)]
    return {
        "size": size, "layers": layers, "whole": whole, "parameters": parameters, "seconds": seconds,
        "seconds_whole": seconds + sum(blocks) * (whole / layers - 1),
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "phases": {name: dataclasses.asdict(phase) for name, phase in phases.phases.items()},
    }  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    """Return the table in `docs/gpu.md`, or a sentence if nothing was measured."""
    if not results:
        return NOT_YET
    lines = list[str]()
    for result in results:
        names = sorted({name for run in result["runs"] for name in run["phases"]})
        lines += [f"{result['gpu']}, torch {result['torch']}, {SAMPLES} rows of {SEQLEN} tokens; seconds:", ""]
        lines += ["| model | blocks run | all | whole model | goal | peak GB | " + " | ".join(names) + " |"]
        lines += ["|---" * (len(names) + 6) + "|"]
        for run in result["runs"]:
            spent = [f"{run['phases'][name]['seconds']:.1f}" if name in run["phases"] else "" for name in names]
            cells = [run["size"], f"{run['layers']} of {run['whole']}", f"{run['seconds']:.0f}",
                     f"{run['seconds_whole']:.0f}", GOALS.get(run["size"], "")]  # fmt: skip
            cells.append(f"{run['peak_bytes'] / 1e9:.1f}")
            lines.append("| " + " | ".join(map(str, [*cells, *spent])) + " |")
        lines.append("")
    return "\n".join(lines)


def write(root: Path, result: dict[str, Any]) -> None:
    """Write `benchmarks/results/gpu-run-NAME.json`, and the table of all such files into `docs/gpu.md`."""
    name = "-".join(str(result["gpu"]).lower().split())
    folder, page = root / "benchmarks" / "results", root / PAGE
    (folder / f"gpu-run-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("gpu-run-*.json"))]
    page.write_text(between(page.read_text(), MARKS, table(results)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
