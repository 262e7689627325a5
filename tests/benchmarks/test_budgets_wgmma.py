"""Budgets of the kernels on GPUs with other tensor cores: wgmma, tcgen05, and AMD's MFMA."""

import pytest
from helpers.budgeting import cases, check, measured, same_compiler

pytestmark = pytest.mark.slow

GPUS = ("sm_90", "sm_100", "gfx942")


@same_compiler
@pytest.mark.parametrize("entry", cases(*GPUS))
def test_budget(entry):
    check(entry, measured(*GPUS)[entry.kernel, entry.arch])
