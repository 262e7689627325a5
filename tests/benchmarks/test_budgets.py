"""What counts as a regression and as a demand that is missed; and the committed file as a whole."""

import json
import re
from dataclasses import asdict, fields, replace

import pytest
from click.testing import CliRunner
from helpers.budgeting import RECORDED

from benchmarks.kernel_budgets.budgets import BUDGETS, budget_of, compare, dump, entries, main, misses, regressions
from benchmarks.kernel_budgets.entries import Entry
from benchmarks.kernel_budgets.machine_code import Figures
from benchmarks.kernel_budgets.reasons import REASONS

GOOD = Figures("IMMA.16832.S8.S8", 128, 0, 65536, 2, 64, 160, 3.0, 0, 6, 0, 0)
ENTRY = Entry("w4a8", "sm_80", lambda: None, 128 * 128, re.compile(r"IMMA\.16832\.S8\.S8"), 3.2)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"registers": 129}, "registers 129 above 128"),
        ({"spills": 1}, "spills 1 above 0"),
        ({"shared": 70000}, "shared 70000 above 65536"),
        ({"ctas": 1}, "1 CTAs fit an SM, not 2"),
        ({"logic": 3.1}, "logic 3.1 above 3.0"),
        ({"byte_shuffles": 4}, "byte_shuffles 4 above 0"),
        ({"narrow_loads": 1}, "narrow_loads 1 above 0"),
        ({"scale_loads": 1}, "scale_loads 1 above 0"),
        ({"instructions": 161}, "instructions 161 above 160"),
        ({"mma": ""}, "no matrix instruction instead of IMMA.16832.S8.S8"),
    ],
)
def test_what_is_worse_is_named(change, told):
    assert regressions(replace(GOOD, **change), asdict(GOOD)) == [told]


def test_what_is_better_is_no_regression():
    assert regressions(replace(GOOD, registers=96, ctas=3, instructions=150, logic=2.0), asdict(GOOD)) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"mma": "HMMA.16816"}, "multiplies by HMMA.16816 instead of"),
        ({"spills": 9}, "9 instructions spill"),
        ({"logic": 3.3}, "3.3 logic operations for 8 weights, above 3.2"),
        ({"narrow_loads": 2}, "2 loads of operands are below 128 bits"),
        ({"scale_loads": 2}, "2 loads in the loop are of 32 bits or less"),
        ({"ctas": 0}, "does not fit an SM"),
    ],
)
def test_what_is_missed_is_told(change, told):
    (found,) = misses(ENTRY, replace(GOOD, **change))
    assert found.startswith(told)
    assert budget_of(ENTRY, replace(GOOD, **change))["misses"] == [found]


def test_nothing_is_missed_by_a_good_kernel():
    assert budget_of(ENTRY, GOOD) == asdict(GOOD)


def test_the_file_holds_every_entry_and_no_other():
    held = {(kernel, arch) for kernel, budgets in RECORDED["kernels"].items() for arch in budgets}
    listed = [(entry.kernel, entry.arch) for entry in entries()]
    assert held == set(listed) and len(listed) == len(held)


def test_what_misses_a_demand_has_a_reason_and_each_reason_is_needed():
    budgets = {(kernel, arch): budget for kernel, of in RECORDED["kernels"].items() for arch, budget in of.items()}
    given = {at: budget["reason"] for at, budget in budgets.items() if budget.get("misses")}
    assert not [at for at, reason in given.items() if not reason]
    assert set(given.values()) == {reason for *_, reason in REASONS}


def test_no_kernel_spills_anywhere():
    assert not [json.dumps(of) for of in RECORDED["kernels"].values() for budget in of.values() if budget["spills"]]


def test_some_gpus_only_are_not_written():
    done = CliRunner().invoke(main, ["--write", "sm_80"])
    assert done.exit_code == 2 and "--write writes the budgets of all GPUs; leave out sm_80" in done.output


def test_a_regression_is_told_by_the_name_of_the_kernel(capsys):
    entry = next(entry for entry in entries() if entry.arch == "sm_90")
    good = {name: RECORDED["kernels"][entry.kernel]["sm_90"][name] for name in asdict(GOOD)}
    assert compare([(entry, Figures(**good))]) == 0
    assert compare([(entry, Figures(**good | {"spills": 7}))]) == 1
    assert capsys.readouterr().out == f"{entry.kernel} on sm_90: spills 7 above 0\n"


def test_the_file_is_what_the_command_writes():
    figures = {name.name for name in fields(Figures)}
    found = [
        (entry, Figures(**{name: RECORDED["kernels"][entry.kernel][entry.arch][name] for name in figures}))
        for entry in entries()
    ]
    assert dump(found) == BUDGETS.read_text()
