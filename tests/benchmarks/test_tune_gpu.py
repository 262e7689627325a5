"""`make tune-gpu` without a GPU: what it tries, what it keeps, and what it writes."""

import functools
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.gpu import tune as tune_gpu
from benchmarks.gpu.tune import SCHEMES, candidates, changed, dump, fits, measure, operand_sets, tune
from quantize.kernels.config import TABLE, Config, fitted, read_table

CPU = torch.device("cpu")


def wall_clock(calls):
    start = time.perf_counter()
    for call in calls:
        call()
    return [(time.perf_counter() - start) / len(calls) * 1e6]


@pytest.fixture
def few_tiles(monkeypatch):
    monkeypatch.setattr(tune_gpu, "TILES", ((16, 16, 4, 0), (16, 32, 4, 0)))
    monkeypatch.setattr(tune_gpu, "STAGES", (2,))


def test_a_table_is_written_as_it_lies_there():
    assert dump(read_table()) == TABLE.read_text()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("M", [1, 16, 64, 256, 1024, 4096])
def test_every_shape_has_candidates_that_fit_and_not_too_many(scheme, M):
    found = list(candidates(scheme, (M, 14336, 4096), "sm_89"))
    assert 0 < len(found) <= 120 and len(set(found)) == len(found)
    assert all(fits(config, "sm_89") and fitted(config, M, 4096, scheme.endswith("g")) == config for config in found)


def test_few_tokens_are_split_and_many_are_not():
    assert {config.split_k for config in candidates("w4a8", (16, 4096, 4096), "sm_90")} == {1, 2, 4, 8}
    assert {config.split_k for config in candidates("w4a8", (4096, 4096, 4096), "sm_90")} == {1}


def test_stages_fill_the_shared_memory():
    assert fits(Config(128, 128, 128, num_stages=4, variant="shift"), "sm_89")  # 4 · 24 KB of 100
    assert not fits(Config(128, 128, 128, num_stages=5, variant="shift"), "sm_89")
    assert not fits(Config(128, 128, 128, num_stages=4, variant="bytes"), "sm_89")


def test_only_what_is_not_the_default_is_written():
    row = changed(Config(16, 64, 128, 4, num_stages=5, variant="mask", asm=True))
    assert row == {
        "block_m": 16, "block_n": 64, "block_k": 128, "split_k": 4, "num_stages": 5, "variant": "mask", "asm": True,
    }  # fmt: skip
    assert Config(**row) == Config(16, 64, 128, 4, num_stages=5, variant="mask", asm=True)


@pytest.mark.usefixtures("few_tiles")
@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "w4a16"])  # interpreted bf16 is wrong
def test_real_products_are_tuned(scheme):
    (row,) = tune(scheme, "interpreter", CPU, wall_clock, [(32, 256)], [3])
    assert row["shape"] == [3, 32, 256] and row["block_n"] in (16, 32)
    json.dumps(row)


def test_the_fastest_is_kept(monkeypatch):
    times = iter([9.0, None, 4.0, 7.0])
    tried = [Config(16, 64, split_k=parts) for parts in (1, 2, 4, 8)]
    monkeypatch.setattr(tune_gpu, "candidates", lambda *_: iter(tried))
    monkeypatch.setattr(tune_gpu, "measure", lambda *_: next(times))
    (row,) = tune("w4a8", "sm_90", CPU, wall_clock, [(64, 256)], [1])
    assert row["split_k"] == 4


@pytest.mark.parametrize("variant", ["mask", "bytes"])
def test_what_is_wrong_or_does_not_run_has_no_time(variant):
    """`mask` without its offset is wrong; `bytes` does not multiply packed weights."""
    ours = SCHEMES["w4a8"]
    (operands,) = operand_sets(ours, (3, 16, 128), CPU, 1)
    expected = ours.expected(operands)
    operands[0].low_sum.zero_()
    run = functools.partial(ours.run, Config(16, 16, variant=variant))
    assert measure(run, [operands], expected, pytest.fail) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_stops():
    before = TABLE.read_text()
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu.tune"], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2 and done.stderr.startswith("nothing was measured: torch finds no GPU here")
    assert TABLE.read_text() == before
