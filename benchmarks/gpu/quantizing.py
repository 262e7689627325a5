"""`make bench-gpu-run` quantizes random Llamas on the GPU, and says where the time goes and what memory it takes.

It checks first that the GPU's results are right, and times nothing otherwise. A model of 8B or 70B shapes has two
blocks here; what a block takes, times their number, is the time of a whole one. After `LIMIT` seconds nothing more is
measured. It writes `benchmarks/gpu/NAME.json` and a table in `docs/gpu.md`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.bench import PAGE, ROOT, between, measure_all
from benchmarks.gpu.checks import check
from benchmarks.gpu.deadline import Deadline
from benchmarks.gpu.machine import ceilings, describe, require_gpu
from benchmarks.gpu.roofline import Roof
from benchmarks.gpu.rows import part
from benchmarks.gpu.timing import Timer, time_graph
from benchmarks.gpu.whole_run import GOALS, MEMORY, RUNS, SAMPLES, SEQLEN, measured
from quantize.errors import UsageError

MARKS = ("<!-- gpu-run -->", "<!-- /gpu-run -->")
NOT_YET = "Not yet measured: no GPU was at hand. `make bench-gpu-run` measures, and writes this table."
LIMIT = 8 * 60  # seconds of all checks and measurements
KERNELS = (14336, 4096)  # N, K of the products that are timed last
TOKENS = (16, 4096)  # and M
Result = dict[str, Any]


def main(*sizes: str) -> int:
    """Check, measure a model of each size and then products, write the results and print them; return the exit code."""
    try:
        require_gpu()
        deadline, device = Deadline(LIMIT), torch.device("cuda")
        with tempfile.TemporaryDirectory() as folder:
            checked = check(device, Path(folder))
    except (ArithmeticError, UsageError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    result = describe(ROOT) | {"checks": checked}
    result |= measure(sizes or tuple(RUNS), device, deadline, time_graph, ceilings(device, time_graph))
    write(ROOT, result)
    print("\n".join(missing(result)), file=sys.stderr)
    return 1 if result["failures"] else 0


def measure(
    sizes: Sequence[str], device: torch.device, deadline: Deadline, timer: Timer, roof: Roof, **data: int
) -> Result:
    """Measure runs and then products until the time is over.

    Args:
        sizes: keys of `RUNS`.
        device: what is measured.
        deadline: how long.
        timer: times products.
        roof: the rates of the device.
        data: the calibration data, if it is not `SAMPLES` rows of `SEQLEN` tokens.
    """
    runs, rows, wrong = list[Result](), list[Result](), list[str]()
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            run = deadline.measured(size, partial(measured, size, Path(folder), device, roof, **data))
        print(json.dumps(run), flush=True)
        runs += [run] if run else []
    for M in TOKENS:
        products = partial(measure_all, device, timer, [KERNELS], [M], wrong, roof)
        found = deadline.measured(f"products of {M} tokens", products)
        rows += found["rows"] if found else []
    failures = [f"{name}: {why}" for name, why in deadline.failures.items()] + wrong
    return {"runs": runs, "rows": rows, "ceilings": asdict(roof), "missed": deadline.missed, "failures": failures}


def missing(result: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each thing that was not measured."""
    late = [f"{name} was not measured, as its time was over." for name in result["missed"]]
    return late + [f"Failed: {failure}." for failure in result["failures"]]


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the table in `docs/gpu.md`, or a sentence if nothing was measured."""
    return "\n".join(line for result in results for line in lines_of(result)) or NOT_YET


def lines_of(result: Mapping[str, Any]) -> list[str]:
    """Return a GPU's lines: a row for each run, what was not measured, and the products."""
    names = sorted({name for run in result["runs"] for name in run["phases"]})
    head = ["model", "blocks run", "all", "whole model", "goal", "least", "reading and writing", "of it hidden",
            f"peak GB of {MEMORY}", "foretold", *names]  # fmt: skip
    lines = [f"{result['gpu']}, torch {result['torch']}, {SAMPLES} rows of {SEQLEN} tokens; seconds:", ""]
    lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for run in result["runs"]:
        spent = [f"{run['phases'][name]['seconds']:.1f}" if name in run["phases"] else "" for name in names]
        cells = [run["size"], f"{run['layers']} of {run['whole']}", f"{run['seconds']:.0f}",
                 f"{run['seconds_whole']:.0f}", GOALS.get(run["size"], ""), f"{run['seconds_least']:.1f}",
                 f"{run['reading_and_writing']:.1f}", f"{run['hidden']:.1f}", f"{run['peak_bytes'] / 1e9:.1f}",
                 f"{run['foretold_bytes'] / 1e9:.1f}"]  # fmt: skip
        lines.append("| " + " | ".join(map(str, [*cells, *spent])) + " |")
    return [*lines, "", *missing(result), *(part(result) if result["rows"] else [])]


def write(root: Path, result: Mapping[str, Any]) -> None:
    """Write `benchmarks/gpu/NAME.json`, and the table of all such files into `docs/gpu.md`."""
    name = "-".join(str(result["gpu"]).lower().split())
    folder, page = root / "benchmarks" / "gpu", root / PAGE
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    page.write_text(between(page.read_text(), MARKS, table(results)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
