"""Budgets of the kernels on GPUs whose tensor cores are driven by mma.sync."""

import pytest
from helpers.budgeting import cases, check, measured, same_compiler

pytestmark = pytest.mark.slow

GPUS = ("sm_80", "sm_89", "sm_120")


@same_compiler
@pytest.mark.parametrize("entry", cases(*GPUS))
def test_budget(entry):
    check(entry, measured(*GPUS)[entry.kernel, entry.arch])
