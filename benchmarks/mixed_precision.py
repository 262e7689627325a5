"""`make bench-mixed` spends the same bits in four ways: results/mixed-precision.json, .md and a picture (resumes).

*measured* is `average_bits`. *uniform* gives all linears the smallest groups that fit, where these divide the columns.
*medians* is the rule of myQASR (Lee et al. 2023, arXiv 2307.12659, section 3): linears whose outputs have the smallest
medians of |y| take fewer bits. *random* upgrades linears in a random order. The last two choose between the recipe's
own groups and 8 bits. `--format` takes a code book in place of integers.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.machine import processor
from benchmarks.models.bench import TEXT
from benchmarks.models.windows import read_windows
from quantize.checkpoint.opening import open_checkpoint
from quantize.eval.perplexity import score_language
from quantize.pipeline.bit_options import Unit, units_of
from quantize.pipeline.mixed_precision.resolve import entries
from quantize.pipeline.prepare import Prepared, prepare
from quantize.pipeline.quantize import quantize_model
from quantize.recipe.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
METHODS, BUDGETS = ("uniform", "measured", "medians", "random"), (4.25, 4.5, 4.75, 5.0, 5.5, 6.0)
SEED = 0
Row = dict[str, Any]


def medians(prepared: Prepared, units: Sequence[Unit]) -> list[float]:
    """Return for each unit the largest median of |y| over the outputs of its linears, on four calibration rows."""
    model, found = prepared.checkpoint.load(), dict[str, float]()

    def note(path: str, y: torch.Tensor) -> None:
        found[path] = max(found.get(path, 0.0), float(y.abs().median()))

    for path in (linear.path for unit in units for linear in unit.linears):
        model.get_submodule(path).register_forward_hook(lambda *call, path=path: note(path, call[-1]))
    with torch.no_grad():
        for row in prepared.samples.rows[:4]:
            model(**{name: x[None] for name, x in row.items()})
    return [max(found[linear.path] for linear in unit.linears) for unit in units]


def chosen(method: str, units: Sequence[Unit], budget: int, prepared: Prepared) -> list[int] | None:
    """Return the number of each unit's option, or None if nothing fits; a method other than `measured`."""

    def bits(numbers: Sequence[int]) -> int:
        return sum(unit.options[n].bits for unit, n in zip(units, numbers, strict=True))

    if method == "uniform":
        sizes = {option.scheme.weights.group_size for unit in units for option in unit.options}
        all_alike = [[largest_groups(unit, size) for unit in units] for size in sizes if size]
        fitting = [numbers for numbers in all_alike if bits(numbers) <= budget]
        return max(fitting, key=bits, default=None)
    order = list(range(len(units)))
    if method == "random":
        random.Random(SEED).shuffle(order)
    else:
        found = medians(prepared, units)
        order.sort(key=lambda n: -found[n])
    numbers = [0] * len(units)
    for n in order:
        wider = [*numbers[:n], len(units[n].options) - 1, *numbers[n + 1 :]]
        numbers = wider if bits(wider) <= budget else numbers
    return numbers if bits(numbers) <= budget else None


def largest_groups(unit: Unit, most: int) -> int:
    """Return the number of the option with the largest groups of at most so many columns, in the recipe's own bits."""
    own = unit.options[0].scheme.weights.num_bits
    kinds = [(n, x.scheme.weights) for n, x in enumerate(unit.options)]
    found = ((args.group_size, n) for n, args in kinds if args.num_bits == own and 0 < args.group_size <= most)
    return max(found, default=(0, 0))[1]


def measured(
    model: Path, scheme: str, method: str, budget: float, prepared: Prepared, done: Sequence[Row], changes: Row
) -> Row | None:
    """Quantize a model within a budget, and score it; of the rows that are done one of the same bits is the same."""
    units = units_of(prepared.plan, prepared.program, prepared.checkpoint)
    weights, recipe = sum(unit.parameters for unit in units), dict(changes)
    if method == "measured":
        recipe |= {"average_bits": budget}
    else:
        numbers = chosen(method, units, math.floor(budget * weights), prepared)
        if numbers is None:
            return None
        options = [unit.options[n] for unit, n in zip(units, numbers, strict=True)]
        paths = [linear.path for linear in prepared.program.all_linears]
        recipe |= {"layers": [entry.model_dump(exclude_none=True) for entry in entries(units, options, paths)]}
        stored = sum(option.bits for option in options) / weights
        for row in done:
            if row.get("bits") == stored:
                return {name: row[name] for name in ("bits", "kl", "top1", "megabytes")}
    with tempfile.TemporaryDirectory() as scratch:
        artifact = quantize_model(model, scheme=scheme, recipe=recipe, output_dir=Path(scratch) / "out")
        stored = artifact.manifest["average_bits"]["stored"] if method == "measured" else stored
        found = score_language(artifact.load(), read_windows(model, TEXT), open_checkpoint(model).load())
        size = sum(path.stat().st_size for path in artifact.directory.glob("model-*.safetensors"))
    return {"bits": stored, "kl": found.kl, "top1": found.top1, "megabytes": size / 1e6}


def markdown(rows: Sequence[Row]) -> str:
    """Return a table for each model and scheme."""
    lines = ["# The same bits, spent in four ways", "", (__doc__ or "").strip(), "", str(processor()), ""]
    for model, scheme in dict.fromkeys((row["model"], row["scheme"]) for row in rows):
        lines += [f"## {model}, {scheme}", "", f"| bits a weight | {' | '.join(f'{m}: bits | KL' for m in METHODS)} |"]
        lines += ["|---" * (1 + 2 * len(METHODS)) + "|"]
        here = {(row["budget"], row["method"]): row for row in rows if (row["model"], row["scheme"]) == (model, scheme)}
        for budget in sorted({budget for budget, _ in here}):
            cells = [here.get((budget, method), {}) for method in METHODS]
            told = (f"{x['bits']:.3f} | {x['kl']:.4f}" if x.get("bits") else " | " for x in cells)
            lines.append(f"| {budget:g} | {' | '.join(told)} |")
        lines.append("")
    return "\n".join(lines)


def picture(rows: Sequence[Row], path: Path) -> None:
    """Draw KL over bits, a plot for each model, with a line for each method and kind of activations."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    with rc_context({"svg.hashsalt": "quantize-model", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(8, 3 * math.ceil(len(models) / 2)), layout="constrained")
        for number, model in enumerate(models, 1):
            axes = figure.add_subplot(math.ceil(len(models) / 2), 2, number)
            here = [row for row in rows if row["model"] == model and row.get("bits")]
            kinds = dict.fromkeys((row["method"], row["scheme"][2:]) for row in here)
            for method, kind in kinds:
                alike = [row for row in here if (row["method"], row["scheme"][2:]) == (method, kind)]
                if points := sorted({(row["bits"], row["kl"]) for row in alike}):
                    axes.semilogy(*zip(*points, strict=True), marker="o", markersize=3, label=f"{method}, {kind}")
            axes.set(title=model, xlabel="bits a weight", ylabel="KL, nats a token")
            axes.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})


def place(row: Row) -> tuple[Any, ...]:
    """Return the sort key of a row."""
    return row["model"], row["scheme"], row["budget"], METHODS.index(row["method"])


@click.command()
@click.option("--model", type=click.Path(exists=True, path_type=Path), default=ROOT / "tests/models/books-llama-6m")
@click.option("--scheme", default="W4A16", show_default=True)
@click.option("--format", "number_format", default="int", show_default=True, help="Of the weights.")
@click.option("--method", "methods", type=click.Choice(METHODS), multiple=True, help="[default: all]")
@click.option("--bits", "budgets", type=float, multiple=True, help="[default: 4.25 to 6]")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(
    model: Path, scheme: str, number_format: str, methods: tuple[str, ...], budgets: tuple[float, ...], output: Path
) -> None:
    """Measure what the results lack, and write them after each."""
    path = output / "mixed-precision.json"
    rows: list[Row] = json.loads(path.read_text()) if path.is_file() else []
    changes = {"requantize": True} | ({} if number_format == "int" else {"weights": {"format": number_format}})
    prepared = prepare(model, load_recipe(scheme, changes), None)
    label = scheme if number_format == "int" else f"{scheme}, {number_format}"
    for budget in budgets or BUDGETS:
        for method in methods or METHODS:
            key = {"model": model.name, "scheme": label, "method": method, "budget": budget}
            if any(key.items() <= row.items() for row in rows):
                continue
            alike = [row for row in rows if key.items() - {("budget", budget)} <= row.items() and method == "uniform"]
            row = key | (measured(model, scheme, method, budget, prepared, alike, changes) or {})
            rows = sorted([*rows, row], key=place)
            path.write_text(json.dumps(rows, indent=1) + "\n")
            (output / "mixed-precision.md").write_text(markdown(rows))
            picture(rows, output / "mixed-precision.svg")
            click.echo(json.dumps(row), err=True)


if __name__ == "__main__":
    main()
