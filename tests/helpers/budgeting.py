"""The kernels for the GPUs of one test file are compiled in a process without Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from importlib.metadata import version

import pytest

from benchmarks.kernel_budgets.budgets import BUDGETS, entries, misses, regressions
from benchmarks.kernel_budgets.machine_code import Figures

RECORDED = json.loads(BUDGETS.read_text())
same_compiler = pytest.mark.skipif(
    version("triton") != RECORDED["triton"], reason=f"budgets are figures of Triton {RECORDED['triton']}"
)


def cases(*archs):
    """Return the entries for some GPUs, each of which is a test."""
    return [pytest.param(entry, id=f"{entry.kernel} on {entry.arch}") for entry in entries() if entry.arch in archs]


@cache
def measured(*archs):
    """Return figures by kernel and GPU; one process compiles all kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.kernel_budgets.budgets", "--as-json", *archs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {(kernel, arch): Figures(**figures) for kernel, arch, figures in json.loads(done.stdout)}


def check(entry, found):
    """Check that the kernel is within its budget, and that the budget has a reason for each missed demand."""
    budget = RECORDED["kernels"][entry.kernel][entry.arch]
    if regressions(found, budget):
        # LLVM does not always allocate the same registers (once 134 instead of 127); a real regression comes back
        found = measured.__wrapped__(entry.arch)[entry.kernel, entry.arch]
    assert not regressions(found, budget), (entry.kernel, entry.arch)
    told = [sentence for sentence in misses(entry, found) if sentence not in budget.get("misses", [])]
    assert not told, (entry.kernel, entry.arch)
