"""`make bench-gpu` measures the GPU's ceilings, then every contender on every shape.

It writes `benchmarks/results/gpu-NAME.json` and a table in `docs/gpu.md`.

Operands are random, alternate so that the L2 cache does not hold them, and run from CUDA graphs. Each result is
compared with an exact product before it is timed, in memory that was filled with NaN.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.case import Case
from benchmarks.gpu.engines import Contender, contenders
from benchmarks.gpu.machine import cache_bytes, ceilings, clocks, describe, poisoned, require_gpu
from benchmarks.gpu.roofline import Roof, specified
from benchmarks.gpu.rows import Row, row_of, table, with_speedups
from benchmarks.gpu.timing import Timer, copies, time_graph, time_twice
from quantize.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))  # N, K
TOKENS = (1, 16, 64, 256, 1024, 4096)
PAGE = Path("docs") / "gpu.md"  # has the table between these marks
MARKS = "<!-- gpu -->", "<!-- /gpu -->"


def main() -> int:
    """Measure, write the results, and print what was wrong; return the exit code."""
    try:
        require_gpu()
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    failures: list[str] = []
    result = describe(ROOT) | measure_all(torch.device("cuda"), time_graph, SHAPES, TOKENS, failures)
    write(ROOT, result)
    print("\n".join(failures), file=sys.stderr)
    return 1 if failures else 0


def measure_all(
    device: torch.device,
    timer: Timer,
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    failures: list[str],
    roof: Roof | None = None,
) -> dict[str, Any]:
    """Measure the ceilings and each contender on each shape; failures are added to `failures` as sentences."""
    roof = roof or ceilings(device, timer)
    rows = []
    for N, K in shapes:
        for M in tokens:
            for contender in contenders(device):
                row = measure(contender, (M, N, K), device, timer, roof, failures)
                rows += [row] if row else []
                print(
                    f"{contender.name:16} {M:5} x {N} x {K}: {row['median'] if row else float('nan'):.1f} us",
                    flush=True,
                )
    return {"ceilings": asdict(roof), "rows": with_speedups(rows), "clocks_after": clocks()}


def measure(
    contender: Contender,
    shape: tuple[int, int, int],
    device: torch.device,
    timer: Timer,
    roof: Roof,
    failures: list[str],
) -> Row | None:
    """Measure one contender on one shape; return None if it fails or is wrong, because wrong products are not timed."""
    rng, product = torch.Generator(device).manual_seed(0), contender.product(*shape)
    try:
        case = contender.case(*shape, rng)
        error = distance(case)
        if not error <= contender.tolerance:
            raise ArithmeticError(f"{error:.1e} from the exact product, above {contender.tolerance:.0e}")
        cases = [case, *(contender.case(*shape, rng) for _ in range(copies(product.bytes, cache_bytes(device)) - 1))]
        timing = time_twice(timer, [case.run for case in cases])
    except Exception as failure:  # a contender may be another project's; the others are still measured
        failures.append(f"{contender.name} on {shape}: {failure}")
        return None
    spec = specified(torch.cuda.get_device_name()) if device.type == "cuda" else None
    return row_of(contender.name, product, timing, error, roof, spec)


def distance(case: Case) -> float:
    """Return the relative distance of the result from what is expected, which is NaN if something was not written."""
    with poisoned():
        found = case.run()
    expected = case.expected()
    return float((found.double() - expected).norm() / expected.norm())


def write(root: Path, result: Mapping[str, Any]) -> None:
    """Write `benchmarks/results/gpu-NAME.json`, and the table of all such files into `docs/gpu.md`."""
    name = "-".join(str(result["gpu"]).lower().split())
    (root / "benchmarks" / "results" / f"gpu-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    page = root / PAGE
    page.write_text(with_table(page.read_text(), measured(root)))


def measured(root: Path) -> list[dict[str, Any]]:
    """Return what was measured so far, one result for each GPU."""
    return [json.loads(path.read_text()) for path in sorted((root / "benchmarks" / "results").glob("gpu-*.json"))]


def with_table(page: str, results: Sequence[Mapping[str, Any]]) -> str:
    """Return the text of `docs/gpu.md` with the table between its marks."""
    return between(page, MARKS, table(results))


def between(page: str, marks: tuple[str, str], text: str) -> str:
    """Return a page with a text in the place of what stands between two marks."""
    before, rest = page.split(marks[0])
    return f"{before}{marks[0]}\n{text.strip()}\n{marks[1]}{rest.split(marks[1])[1]}"


if __name__ == "__main__":
    sys.exit(main())
