"""Rows and tables of `make bench-gpu`, from figures worked out by hand."""

from dataclasses import asdict

import pytest

from benchmarks.gpu.roofline import SPECIFIED, Product, Roof
from benchmarks.gpu.rows import NOT_YET, goals, row_of, table, with_speedups
from benchmarks.gpu.timing import Timing, copies, summarize

MEASURED = Roof(4e12, 800e12, 1500e12)
H200 = SPECIFIED["NVIDIA H200"]


def timing(us):
    return Timing(us, us, us, 0.0)


def measured_rows(M=16):
    bf16 = row_of("bf16", Product(M, 14336, 4096), timing(30.0), 0.0, MEASURED, H200)
    int8 = row_of("int8", Product(M, 14336, 4096, 8, 8, 8), timing(20.0), 0.0, MEASURED, H200)
    ours = row_of("W4A8", Product(M, 14336, 4096, 4, 8, 8), timing(10.0), 1e-3, MEASURED, H200)
    return with_speedups([bf16, int8, ours])


def result(M=16, specified=H200):
    return {
        "gpu": "NVIDIA H200",
        "ceilings": asdict(MEASURED),
        "specified": specified and asdict(specified),
        "rows": measured_rows(M),
    }


def test_a_row():
    row = measured_rows()[2]
    moved = 14336 * 4096 / 2 + 16 * 4096 + 16 * 14336 * 2
    assert row["gbps"] == pytest.approx(moved / 10e-6 / 1e9)
    assert row["tops"] == pytest.approx(2 * 16 * 14336 * 4096 / 10e-6 / 1e12)
    assert row["floor_measured"] == pytest.approx(moved / 4e12 / 10e-6)
    assert row["floor_specified"] == pytest.approx(moved / 4.8e12 / 10e-6)
    assert (row["over_bf16"], row["over_int8"], row["error"]) == (3.0, 2.0, 1e-3)


def test_without_a_baseline_there_is_no_speedup():
    (row,) = with_speedups([row_of("W4A8", Product(1, 128, 128, 4, 8, 8), timing(1.0), 0.0, MEASURED, None)])
    assert (row["over_bf16"], row["over_int8"], row["floor_specified"]) == (None, None, None)


def test_goals():
    moved = 14336 * 4096 / 2 + 16 * 4096 + 16 * 14336 * 2
    assert goals(result()) == [
        ("M = 16, part of the copy bandwidth", pytest.approx(moved / 10e-6 / 4e12), 0.7),
        ("M = 16, times bf16", 3.0, 2.8),
    ]
    assert [goal for *_, goal in goals(result(64))] == [2.8]
    (_, part, _), _ = goals(result(4096))
    assert part == pytest.approx(2 * 4096 * 14336 * 4096 / 10e-6 / 1979e12)
    (_, part, _), _ = goals(result(4096, specified=None))
    assert part == pytest.approx(2 * 4096 * 14336 * 4096 / 10e-6 / 1500e12)


def test_a_table():
    lines = table([result()]).splitlines()
    assert lines[0].startswith("NVIDIA H200, which copies 4.00 TB/s and multiplies 800 Tflop/s in bf16 and 1500 Top/s")
    assert lines[2] == "| N × K | M | bf16 | int8 | W4A8 |"
    assert lines[4] == "| 14336 × 4096 | 16 | 30.0 (1.00×, 98%) | 20.0 (1.50×, 74%) | 10.0 (3.00×, 75%) |"
    assert lines[-2:] == [
        "- M = 16, part of the copy bandwidth: 0.75, goal 0.7",
        "- M = 16, times bf16: 3.00, goal 2.8",
    ]


def test_without_a_measurement_the_table_says_so():
    assert table([]) == NOT_YET


def test_two_runs_become_one_timing():
    found = summarize([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert (found.median, found.spread) == (2.5, 0.5)
    assert (found.p10, found.p90) == (1.5, 5.0)


def test_operands_rotate_beyond_the_cache():
    assert copies(8 << 20, 50 << 20) == 13  # 13 · 8 MB are more than 100 MB
    assert copies(1 << 30, 50 << 20) == 3
