"""The measurements of `bench_cpu` become Markdown: ratios, bounds, and whether each goal is met."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.cpu.engines import FLOAT, LLAMA, OURS
from benchmarks.cpu.node_times import fastest
from benchmarks.machine import Processor

Found = dict[str, Any]
PHASES = ("prompt", "decode")
GOALS = (("decode", LLAMA, 1.15), ("prompt", LLAMA, 1.3), ("decode", FLOAT, 5.0))
ENCODER_GOAL, SPEARMAN_GOAL = 3.0, 0.99
HEAD = """# Engines on a CPU (`make bench-cpu`)

Ratios of times measured in one run: each engine in a process of its own, all in turn in each of {rounds} rounds; the
median of the rounds' ratios, and the least and the largest in brackets.
{machine}; onnxruntime {onnxruntime}.

## A random Llama

{size:.2f} · 10⁹ weights are multiplied, in {layers} layers and the head; a prompt of {prompt} tokens, {decode} tokens
behind it.

How many times as long as ours an engine takes, and which part of the machine's best it reaches. For a token that is the
bytes of the weights over the bandwidth of memory, for a prompt the operations of its products over the peak of such
products. The machine's best in the same run: {bandwidth:.1f} GB/s; {peaks}, in 10⁹ operations a second.
llama.cpp and torch score the last token of a prompt alone, the others all of them. The hybrid holds a weight in 12
bits, 4 for tokens and 8 for prompts; the last column is the peak of resident memory, files mapped into it included.

| | runs | prompt | of the bound | decode | of the bound | MB a token | peak MB |
|---|---|---|---|---|---|---|---|"""
ENCODERS = """
## MiniLM-L6, {sentences} sentences of {texts}

| | sentences/s, times float32 | Spearman | kept |
|---|---|---|---|"""


def report(found: Found) -> str:
    """Return the whole file."""
    models, encoders = found["decoders"], found["encoders"]
    peaks = ", ".join(f"{name} {value / 1e9:.0f}" for name, value in models["ceilings"].items() if name != "bytes")
    numbers = {"rounds": len(models["engines"][OURS]["rounds"]), "bandwidth": models["ceilings"]["bytes"] / 1e9}
    numbers |= {name: models[name] for name in ("layers", "prompt", "decode")}
    about, size = dict(found["machine"]), models["weights"] / 1e9
    onnxruntime = about.pop("onnxruntime")
    head = HEAD.format(machine=Processor(**about), onnxruntime=onnxruntime, **numbers, size=size, peaks=peaks)
    rows = [engine_line(models["engines"], name) for name in models["engines"]]
    more = ENCODERS.format(sentences=encoders["sentences"], texts=" and ".join(encoders["texts"]))
    goals = ["", "## Goals", "", *(f"- {line}" for line in goal_lines(models, encoders))]
    return "\n".join([head, *rows, more, *encoder_lines(encoders), *goals, ""])


def seconds(row: Found, phase: str) -> list[float]:
    """Return the median of each round."""
    return [median(found[phase]) for found in row["rounds"]]


def ratios(row: Found, base: Found, phase: str) -> list[float]:
    """Return how many times as long as `base` a row took, round by round."""
    return [x / y for x, y in zip(seconds(row, phase), seconds(base, phase), strict=True)]


def spread(values: list[float]) -> str:
    """Return median, least and largest."""
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def engine_line(rows: Found, name: str) -> str:
    """Return a row of the table of language models."""
    row = rows[name]
    if "missing" in row:
        return f"| {name} | {row['about']} | missing: {row['missing']} | | | | | |"
    parts = {phase: row[f"{phase}_bound"] / median(seconds(row, phase)) for phase in PHASES}
    cells = [f"{spread(ratios(row, rows[OURS], phase))} | {parts[phase]:.0%}" for phase in PHASES]
    peak = max(found["peak_mb"] for found in row["rounds"])
    return " | ".join([f"| {name}", row["about"], *cells, f"{row['decode_mb']:.0f}", f"{peak:.0f} |"])


def encoder_lines(encoders: Found) -> list[str]:
    """Return the rows of the table of encoders."""
    rows, base = encoders["engines"], encoders["engines"][encoders["float"]]
    lines = []
    for name, row in rows.items():
        scores = ", ".join(f"{score:.4f}" for score in row["spearman"])
        lines.append(f"| {name} | {spread(ratios(base, row, 'seconds'))} | {scores} | {kept(row, base):.2%} |")
    return lines


def kept(row: Found, base: Found) -> float:
    """Return the least part of the float model's correlation that is left, of all texts."""
    found: float = min(score / best for score, best in zip(row["spearman"], base["spearman"], strict=True))
    return found


def goal_lines(models: Found, encoders: Found) -> list[str]:
    """Return what was to be reached, by how much it was missed, and what bounds it."""
    rows, lines = models["engines"], []
    for phase, name, wanted in GOALS:
        if missing := next((rows[n]["missing"] for n in (OURS, name) if "missing" in rows[n]), None):
            lines.append(f"{phase} against {name}: not measured ({missing})")
        else:
            best, taken = rows[OURS][f"{phase}_bound"], median(seconds(rows[OURS], phase))
            why = f"ours runs at {best / taken:.0%} of what {'memory' if phase == 'decode' else 'its products'} allows"
            lines.append(verdict(f"{phase} against {name}", median(ratios(rows[name], rows[OURS], phase)), wanted, why))
    base, linears = encoders["engines"][encoders["float"]], encoders["linears"]
    bound = fastest(**linears, seconds=median(seconds(base, "seconds")), peak=models["ceilings"]["int8"])
    for name in encoders["schemes"]:
        row = encoders["engines"][name]
        why = (
            f"{bound:.2f}× at most, its products at the peak of int8 and all else, {1 - linears['part']:.0%} of the "
            f"time of float32, as it is; Spearman kept to {kept(row, base):.2%}, {SPEARMAN_GOAL:.0%} wanted"
        )
        lines.append(verdict(f"MiniLM {name} against float32", median(ratios(base, row, "seconds")), ENCODER_GOAL, why))
    return lines


def verdict(what: str, found: float, wanted: float, why: str) -> str:
    """Return one line on a goal."""
    reached = "reached" if found >= wanted else f"missed by {1 - found / wanted:.0%}"
    return f"{what}: {found:.2f}×, {wanted:g}× wanted: {reached}; {why}"
