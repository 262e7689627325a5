"""How fast this machine multiplies matrices, and the least time that the products of a run take at that."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from quantize.calibration.precision import bfloat16_products, multiplies_bfloat16, product_dtype

PEAK = 2048  # order of the matrices whose product is the yardstick
ROUNDED = ("forward", "error feedback", "sweeps")  # phases that may round the operands of products once for several
SUMS = ("Gram",)  # phases that may round them in each product; all others multiply in float32
Row = dict[str, Any]


def peaks() -> dict[str, float]:
    """Floating-point operations in a second of products as phases take them, and of float32 in a CPU second."""
    a = torch.randn(PEAK, PEAK, generator=torch.Generator().manual_seed(0))
    gemm, gemm_cpu = fastest(a)
    with bfloat16_products(multiplies_bfloat16()):
        found = {"gemm_sums": fastest(a)[0], "gemm_rounded": fastest(a.to(product_dtype()))[0]}
    return {"gemm": gemm, "gemm_cpu": gemm_cpu, **found}


def fastest(a: Tensor) -> tuple[float, float]:
    """Of the square of a matrix, in a second and in a CPU second: the best of six."""
    best = [0.0, 0.0]
    for _ in range(6):
        start = (time.perf_counter(), time.process_time())
        a @ a
        spent = (time.perf_counter() - start[0], time.process_time() - start[1])
        best = [max(old, 2 * len(a) ** 3 / new) for old, new in zip(best, spent, strict=True)]
    return best[0], best[1]


def bound(row: Row) -> float:
    """Seconds that the products of a run take at the rates that the same process measured."""
    return sum((phase["flops"] / row[rate(name)] for name, phase in row["phases"].items()), 0.0)


def rate(phase: str) -> str:
    """Which of `peaks` bounds a phase."""
    return "gemm_rounded" if phase in ROUNDED else "gemm_sums" if phase in SUMS else "gemm"


def verdict(rows: list[Row], peer: str) -> str:
    """What part of the peer's time GPTQ takes as the peer runs it, and what bounds it; nothing without the peer."""
    deepest = max(row["layers"] for row in rows)
    runs = {row["method"]: row for row in rows if row["layers"] == deepest}
    if not {peer, "gptq-plain", "rtn"} <= runs.keys():
        return ""
    ours, theirs, least = runs["gptq-plain"], runs[peer], bound(runs["gptq-plain"])
    time_part, memory_part = (ours[name] / theirs[name] for name in ("seconds", "peak_mb"))
    rates = ", ".join(f"{ours[name] / 1e9:.0f} {what}" for name, what in
                      (("gemm_rounded", "forward and feedback"), ("gemm_sums", "Gram"), ("gemm", "solve")))  # fmt: skip
    return (
        f"At {deepest} layers `gptq-plain` takes {time_part:.0%} of the time and {memory_part:.0%} of the memory of "
        f"{peer}.\n"
        f"Its products alone take at least {least:.0f} s at this machine's fastest ({rates}; GFLOP/s), and "
        f"{runs['rtn']['seconds']:.0f} s are what a run takes that only rounds: together "
        f"{(least + runs['rtn']['seconds']) / theirs['seconds']:.0%} of that time.\n"
    )
