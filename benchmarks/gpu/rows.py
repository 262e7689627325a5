"""`make bench-gpu` records one row for each measured product and shows the rows in `docs/gpu.md`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.gpu.roofline import Product, Roof
from benchmarks.gpu.timing import Timing

Row = Mapping[str, Any]
NOT_YET = "Not yet measured: no GPU was at hand. `make bench-gpu` measures, and writes this table."
DECODE = (16, 14336, 4096)  # M, N, K of the shapes that have goals
BATCH = (64, 14336, 4096)
PREFILL = (4096, 14336, 4096)
BASELINES = ("bf16", "int8")


def row_of(scheme: str, product: Product, timing: Timing, error: float, measured: Roof, specified: Roof | None) -> Row:
    """Return the row of one measured product.

    Args:
        scheme: the name of the contender.
        product: the product's shape and bits.
        timing: the microseconds of one product.
        error: the relative distance of the result from the exact one.
        measured: the measured ceilings of this GPU.
        specified: the ceilings of the data sheet, if known.

    Returns:
        The arguments, and `tops` (10¹² operations/s), `gbps` (10⁹ bytes/s), `floor_measured` and `floor_specified` (the
        part of the time that the roofline would take, 1 at best).
    """
    return {
        "scheme": scheme,
        **asdict(product),
        **asdict(timing),
        "error": error,
        "tops": product.operations / timing.median * 1e-6,
        "gbps": product.bytes / timing.median * 1e-3,
        "floor_measured": product.floor(measured) / timing.median,
        "floor_specified": product.floor(specified) / timing.median if specified else None,
    }


def with_speedups(rows: Sequence[Row]) -> list[Row]:
    """Add `over_bf16` and `over_int8`, the speedups over these on the same shape; None if they were not measured."""
    base = {(row["scheme"], shape_of(row)): row["median"] for row in rows}
    return [
        {**row, **{f"over_{name}": ratio(base.get((name, shape_of(row))), row["median"]) for name in BASELINES}}
        for row in rows
    ]


def ratio(slow: float | None, fast: float) -> float | None:
    """Return the speedup."""
    return slow / fast if slow is not None else None


def shape_of(row: Row) -> tuple[int, int, int]:
    """Return M, N, K."""
    return row["M"], row["N"], row["K"]


def goals(result: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Return name, measured value and goal of each goal for 14336 × 4096 whose shape was measured."""
    found: dict[tuple[int, int, int], Row] = {shape_of(row): row for row in result["rows"] if row["scheme"] == "W4A8"}
    told = []
    if row := found.get(DECODE):
        told.append(("M = 16, part of the copy bandwidth", row["gbps"] * 1e9 / result["ceilings"]["bandwidth"], 0.7))
        told.append(("M = 16, times bf16", row["over_bf16"], 2.8))
    if row := found.get(BATCH):
        told.append(("M = 64, times bf16", row["over_bf16"], 2.8))
    if row := found.get(PREFILL):
        peak = (result["specified"] or result["ceilings"])["int8"]
        told.append(("M = 4096, part of the int8 peak", row["tops"] * 1e12 / peak, 0.6))
        told.append(("M = 4096, times bf16", row["over_bf16"], 1.5))
    return told


def table(results: Iterable[Mapping[str, Any]]) -> str:
    """Return the table in `docs/gpu.md`, with a part for each measured GPU, or a sentence if there is none."""
    parts = [line for result in results for line in part(result)]
    return "\n".join(parts) if parts else NOT_YET


def part(result: Mapping[str, Any]) -> list[str]:
    """Return one GPU's table, with a row for each shape and a column for each scheme, and its goals."""
    rows = result["rows"]
    schemes, at = (
        list(dict.fromkeys(row["scheme"] for row in rows)),
        {(row["scheme"], shape_of(row)): row for row in rows},
    )
    ceilings = result["ceilings"]
    head = (
        f"{result['gpu']}, which copies {ceilings['bandwidth'] / 1e12:.2f} TB/s and multiplies "
        f"{ceilings['bf16'] / 1e12:.0f} Tflop/s in bf16 and {ceilings['int8'] / 1e12:.0f} Top/s in int8; microseconds "
        "(times bf16, part of what the measured roofline allows):"
    )
    lines = [head, "", "| N × K | M | " + " | ".join(schemes) + " |", "|---" * (len(schemes) + 2) + "|"]
    for M, N, K in dict.fromkeys(map(shape_of, rows)):
        cells = [cell(at.get((scheme, (M, N, K)))) for scheme in schemes]
        lines.append(f"| {N} × {K} | {M} | " + " | ".join(cells) + " |")
    aims = [f"- {name}: {found:.2f}, goal {goal}" for name, found, goal in goals(result)]
    return [*lines, "", *aims, ""]


def cell(row: Row | None) -> str:
    """Return the cell of one measured product, or an empty text."""
    if row is None:
        return ""
    times = f"{row['over_bf16']:.2f}×, " if row["over_bf16"] is not None else ""
    return f"{row['median']:.1f} ({times}{row['floor_measured']:.0%})"
