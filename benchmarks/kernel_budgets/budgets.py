"""`kernels/budgets.json` says what each kernel may use on each GPU, by machine code that is compiled ahead of time.

`python -m benchmarks.kernel_budgets.budgets` compiles all kernels and prints what regressed; with `--write` it writes
the file anew.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import triton

import quantize.kernels.config as kernels
from benchmarks.kernel_budgets.compile_ahead import ARCHITECTURES, compile_only
from benchmarks.kernel_budgets.entries import Entry, products
from benchmarks.kernel_budgets.machine_code import Figures, figures
from benchmarks.kernel_budgets.others import others
from benchmarks.kernel_budgets.reasons import reason_for

BUDGETS = Path(kernels.__file__).with_name("budgets.json")
MORE_IS_WORSE = (
    "registers", "spills", "shared", "instructions", "logic", "byte_shuffles", "narrow_loads", "scale_loads",
)  # fmt: skip
Budget = Mapping[str, Any]


def entries() -> list[Entry]:
    """Return all entries."""
    return [*products(), *others()]


def measure(entry: Entry) -> Figures:
    """Compile the last kernel that the entry launches, and read its figures."""
    with compile_only(entry.arch) as compiled:
        entry.launch()
    return figures(compiled[-1], entry.weights)


def misses(entry: Entry, found: Figures) -> list[str]:
    """Return the demands that a kernel does not meet, as phrases."""
    demands = [
        (entry.mma.fullmatch(found.mma), f"multiplies by {found.mma or 'nothing'} instead of {entry.mma.pattern}"),
        (found.spills == 0, f"{found.spills} instructions spill"),
        (found.logic <= entry.logic, f"{found.logic} logic operations for 8 weights, above {entry.logic}"),
        (not found.narrow_loads, f"{found.narrow_loads} loads of operands are below 128 bits"),
        (entry.scales or not found.scale_loads, f"{found.scale_loads} loads in the loop are of 32 bits or less"),
        (found.ctas > 0, "does not fit an SM"),
    ]
    return [told for met, told in demands if not met]


def regressions(found: Figures, budget: Budget) -> list[str]:
    """Return in what a kernel is worse than its budget, as phrases; better figures are no regression."""
    now = asdict(found)
    worse = [f"{name} {now[name]} above {budget[name]}" for name in MORE_IS_WORSE if now[name] > budget[name]]
    worse += [f"{found.ctas} CTAs fit an SM, not {budget['ctas']}"] * (found.ctas < budget["ctas"])
    worse += [f"{found.mma or 'no matrix instruction'} instead of {budget['mma']}"] * (found.mma != budget["mma"])
    return worse


def budget_of(entry: Entry, found: Figures) -> dict[str, Any]:
    """Return the figures, with the demands that they miss and the reason."""
    missed = misses(entry, found)
    why = {"misses": missed, "reason": reason_for(entry.kernel, entry.arch)} if missed else {}
    return asdict(found) | why


def report(chosen: Iterable[Entry]) -> Iterator[tuple[Entry, Figures]]:
    """Measure entries, and print a line for each of them."""
    for entry in chosen:
        found = measure(entry)
        told = "; ".join(misses(entry, found))
        click.echo(f"{entry.arch:7} {entry.kernel:34} {found.mma:26} {summary(found)}  {told}", err=True)
        yield entry, found


def summary(found: Figures) -> str:
    """Return the figures as one line."""
    return (
        f"{found.registers:3} regs {found.spills:3} spills {found.shared >> 10:3} KB {found.ctas} CTAs, "
        f"loop {found.mmas:3} mma {found.instructions:4} instr {found.logic:5} logic/8w "
        f"{found.wide_loads}/{found.narrow_loads}/{found.scale_loads} loads"
    )


@click.command()
@click.option("--write", is_flag=True, help="Write kernels/budgets.json anew.")
@click.option("--as-json", is_flag=True, help="Print the figures as JSON, and compare nothing.")
@click.argument("archs", nargs=-1)
def main(write: bool, as_json: bool, archs: tuple[str, ...]) -> None:
    """Compile every kernel for every GPU (or only for ARCHS) and compare it with its budget.

    Raises:
        click.UsageError: `--write` for some GPUs only would lose the others.
    """
    if write and archs:
        raise click.UsageError("--write writes the budgets of all GPUs; leave out " + " ".join(archs))
    found = list(report(entry for entry in entries() if entry.arch in (archs or ARCHITECTURES)))
    if as_json:
        click.echo(json.dumps([[entry.kernel, entry.arch, asdict(now)] for entry, now in found]))
    elif write:
        BUDGETS.write_text(dump(found))
    else:
        sys.exit(compare(found))


def dump(found: Iterable[tuple[Entry, Figures]]) -> str:
    """Return the file's text, by kernel and GPU."""
    table: dict[str, dict[str, Any]] = {}
    for entry, now in found:
        table.setdefault(entry.kernel, {})[entry.arch] = budget_of(entry, now)
    return json.dumps({"triton": triton.__version__, "kernels": table}, indent=1) + "\n"


def compare(found: Iterable[tuple[Entry, Figures]]) -> int:
    """Print what regressed; return the exit code."""
    budgets, code = json.loads(BUDGETS.read_text())["kernels"], 0
    for entry, now in found:
        for told in regressions(now, budgets[entry.kernel][entry.arch]):
            click.echo(f"{entry.kernel} on {entry.arch}: {told}")
            code = 1
    return code


if __name__ == "__main__":
    main()
