"""`make bench-gpu` without a GPU: it says so and stops; and all but the graphs, on the CPU's reference engine."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import bench, engines
from benchmarks.gpu.bench import MARKS, PAGE, distance, measure, measure_all, measured, with_table, write
from benchmarks.gpu.case import Case
from benchmarks.gpu.engines import Contender, Native, contenders
from benchmarks.gpu.machine import ceilings, poisoned
from benchmarks.gpu.roofline import Product, Roof
from benchmarks.gpu.rows import NOT_YET
from quantize.kernels.config import Config

CPU, ROOF = torch.device("cpu"), Roof(1e10, 1e11, 2e11)
ROOT = Path(__file__).parents[2]


def wall_clock(calls):
    """Microseconds of one call, three times."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for call in calls:
            call()
        times.append((time.perf_counter() - start) / len(calls) * 1e6)
    return times


@pytest.fixture(scope="module")
def result():
    failures = []
    found = measure_all(CPU, wall_clock, [(48, 256)], [1, 40], failures, ROOF)
    assert not failures
    return {"gpu": "A CPU", "specified": None, **found}


def test_every_contender_is_right_on_every_shape(result):
    names = {contender.name for contender in contenders(CPU)}
    assert {"bf16", "int8", "W8A8", "W4A8", "W4A8 from bf16", "W4A8 g128", "W4A4", "W4A4 from bf16"} <= names
    assert {(row["scheme"], row["M"]) for row in result["rows"] if row["scheme"] != "int8"} == {
        (name, M) for name in names - {"int8"} for M in (1, 40)
    }
    assert all(row["median"] > 0 and row["error"] < 5e-3 for row in result["rows"])


def test_four_bit_rows_move_four_bits(result):
    row = next(row for row in result["rows"] if (row["scheme"], row["M"]) == ("W4A8 g128", 40))
    assert (row["weight_bits"], row["activation_bits"], row["group_size"]) == (4, 8, 128)
    assert row["gbps"] * row["median"] * 1e3 == pytest.approx(48 * 256 / 2 + 48 * 2 + 40 * 256 + 40 * 48 * 2)


def test_speed_is_told_against_bf16(result):
    bf16, ours = (next(row for row in result["rows"] if row["scheme"] == name) for name in ("bf16", "W4A8"))
    assert ours["over_bf16"] == bf16["median"] / ours["median"]


def test_what_is_written_is_what_the_page_shows(result, tmp_path):
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / PAGE).parent.mkdir()
    (tmp_path / PAGE).write_text(f"above\n{MARKS[0]}\n{NOT_YET}\n{MARKS[1]}\nbelow\n")
    write(tmp_path, result)
    assert (
        json.loads((tmp_path / "benchmarks" / "results" / "gpu-a-cpu.json").read_text())
        == result
        == measured(tmp_path)[0]
    )
    text = (tmp_path / PAGE).read_text()
    assert text.startswith(f"above\n{MARKS[0]}\nA CPU, which copies 0.01 TB/s") and text.endswith(
        f"{MARKS[1]}\nbelow\n"
    )
    assert "| 48 × 256 | 40 |" in text and NOT_YET not in text


def test_the_page_shows_what_is_committed():
    text = (ROOT / PAGE).read_text()
    assert with_table(text, measured(ROOT)) == text


def test_int4_products_are_a_contender_where_there_are_int4_tensor_cores(monkeypatch):
    assert "W4A4 int4" not in {contender.name for contender in contenders(CPU)}
    monkeypatch.setattr(engines, "architecture", lambda device: "sm_89")
    assert "W4A4 int4" in {contender.name for contender in contenders(CPU)}
    twin = Native(Config(16, 16, 256, variant="native"))
    assert distance(twin.case(3, 20, 200, torch.Generator().manual_seed(0))) < 5e-3


def wrong(case):
    return Contender("wrong", Product, case)


def test_a_wrong_result_is_not_timed():
    failures = []
    off = wrong(lambda M, N, K, rng: Case(lambda: torch.ones(M, N), lambda: torch.ones(M, N).double() * 1.1))
    assert measure(off, (2, 3, 4), CPU, pytest.fail, ROOF, failures) is None
    assert failures == ["wrong on (2, 3, 4): 9.1e-02 from the exact product, above 1e-02"]


def test_what_is_left_unwritten_is_wrong():
    failures = []
    idle = wrong(lambda M, N, K, rng: Case(lambda: torch.empty(M, N), lambda: torch.ones(M, N).double()))
    assert measure(idle, (64, 64, 4), CPU, pytest.fail, ROOF, failures) is None
    assert failures == ["wrong on (64, 64, 4): nan from the exact product, above 1e-02"]


def test_memory_is_poisoned_for_a_while():
    with poisoned():
        assert torch.empty(5).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_breaks_is_told_and_the_others_go_on():
    failures = []
    assert measure(wrong(lambda *shape: {}[shape]), (2, 3, 4), CPU, pytest.fail, ROOF, failures) is None
    assert len(failures) == 1 and failures[0].startswith("wrong on (2, 3, 4): ")


def test_distance_is_relative():
    assert distance(Case(lambda: torch.full((2,), 3.0), lambda: torch.full((2,), 2.0).double())) == pytest.approx(0.5)


def test_ceilings_are_operations_over_time():
    roof = ceilings(CPU, lambda calls: [calls[0]() is None or 2.0] * 3, square=64, copied=1 << 12)
    assert roof == Roof(2 * 4096 / 2e-6, 2 * 64**3 / 2e-6, 2 * 64**3 / 2e-6)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_stops():
    before = sorted(path.name for path in (ROOT / "benchmarks" / "results").iterdir())
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.bench"], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("nothing was measured: torch finds no GPU here") and done.stderr.count("\n") == 1
    assert sorted(path.name for path in (ROOT / "benchmarks" / "results").iterdir()) == before


def test_the_exit_code_tells_of_failures(monkeypatch, capsys):
    monkeypatch.setattr(bench, "require_gpu", lambda: None)
    monkeypatch.setattr(bench, "describe", lambda root: {"gpu": "A CPU"})
    monkeypatch.setattr(bench, "write", lambda root, result: None)
    monkeypatch.setattr(bench, "measure_all", lambda *given: given[-1].append("W4A8 on (1, 2, 3): nan") or {})
    assert bench.main() == 1
    assert capsys.readouterr().err == "W4A8 on (1, 2, 3): nan\n"
