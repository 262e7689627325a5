"""`make bench-gpu-run` without a GPU: it says so; its checks, its deadline and its timeline run on the CPU."""

import dataclasses
import runpy
import sys
import time

import pytest
import torch

from benchmarks.gpu import checks, quantizing, whole_run
from benchmarks.gpu.checks import check, columns, gram_matrix, levels, loss, output, product
from benchmarks.gpu.deadline import Deadline
from benchmarks.gpu.engines import contenders
from benchmarks.gpu.quantizing import MARKS, NOT_YET, PAGE, ROOT, table, write
from benchmarks.gpu.roofline import Roof
from benchmarks.gpu.whole_run import least_seconds
from quantize.calibration.statistics import Gram
from quantize.errors import QuantizeError
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.quantizers.gptq import GPTQ

CPU, ROOF = torch.device("cpu"), Roof(1e10, 1e11, 2e11)
RUN = {"size": "8B", "layers": 2, "whole": 32, "seconds": 20.4, "seconds_whole": 150.2, "seconds_least": 9.04,
       "reading_and_writing": 3.0, "hidden": 2.5, "peak_bytes": 18.3e9, "foretold_bytes": 17.7e9,
       "phases": {"Gram": {"seconds": 1.25}, "forward": {"seconds": 4.0}}}  # fmt: skip
RESULT = {"gpu": "A GPU", "torch": "2.11", "runs": [RUN], "rows": [], "missed": ["1.1B"], "failures": ["70B: full"]}


def test_a_row_has_the_goal_the_least_and_each_phase():
    lines = table([RESULT]).splitlines()
    assert lines[2] == (
        "| model | blocks run | all | whole model | goal | least | reading and writing | of it hidden "
        "| peak GB of 20GB | foretold | Gram | forward |"
    )
    assert lines[4] == "| 8B | 2 of 32 | 20 | 150 | 180 | 9.0 | 3.0 | 2.5 | 18.3 | 17.7 | 1.2 | 4.0 |"
    assert lines[6:] == ["1.1B was not measured, as its time was over.", "Failed: 70B: full."]
    assert table([]) == NOT_YET


def test_what_is_written_stands_on_the_page(tmp_path):
    (tmp_path / "benchmarks" / "gpu").mkdir(parents=True)
    (tmp_path / PAGE).parent.mkdir()
    (tmp_path / PAGE).write_text((ROOT / PAGE).read_text())
    write(tmp_path, RESULT)
    inside = (tmp_path / PAGE).read_text().split(MARKS[0])[1].split(MARKS[1])[0]
    assert "| 8B | 2 of 32 |" in inside
    assert [path.name for path in (tmp_path / "benchmarks" / "gpu").iterdir()] == ["a-gpu.json"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_stops(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quantizing"])
    monkeypatch.delitem(sys.modules, quantizing.__name__)
    with pytest.raises(SystemExit) as left:
        runpy.run_module(quantizing.__name__, run_name="__main__")
    assert left.value.code == 2 and capsys.readouterr().err.startswith("nothing was measured: torch finds no GPU here")


@pytest.mark.usefixtures("on_triton")
def test_columns_are_those_of_float64_on_the_kernel():
    assert columns(CPU, rows=40) <= checks.CODES


def test_what_is_wrong_is_seen(monkeypatch):
    """Each part of the code is broken once, by as little as would still be wrong."""
    contender = next(each for each in contenders(CPU) if each.name == "W4A8")
    case, round_columns, update, quantize = contender.case, checks.round_columns, Gram.update, GPTQ.quantize_weights
    wrong = dataclasses.replace(
        contender, case=lambda *a: dataclasses.replace(case(*a), run=lambda: 1.02 * case(*a).run())
    )
    monkeypatch.setattr(Gram, "update", lambda self, x, **kw: update(self, x[1:], **kw))
    assert gram_matrix(CPU) > checks.GRAM
    monkeypatch.undo()
    monkeypatch.setattr(
        checks, "round_columns", lambda t, r, f, g: round_columns(t, r, f * (t.dtype == torch.float64), g)
    )
    assert columns(CPU) > checks.CODES
    monkeypatch.undo()
    swept = iter([0, 2])
    monkeypatch.setattr(GPTQ, "quantize_weights", lambda self, *a: quantize(GPTQ(sweeps=next(swept)), *a))
    assert loss(CPU) > checks.LOSS
    assert product(contender, CPU) <= contender.tolerance < product(wrong, CPU)
    monkeypatch.undo()
    factors, forward = iter([1, 1.01]), QuantizedLinear.forward
    assert levels("nf4", CPU) <= checks.NEAR
    monkeypatch.setattr(QuantizedLinear, "forward", lambda self, x: next(factors) * forward(self, x))
    assert levels("nf4", CPU) > checks.NEAR


@pytest.mark.slow
def test_an_output_is_compared_with_the_reference(artifact_one_layer, monkeypatch):
    assert output(artifact_one_layer.directory, CPU) <= checks.NEAR
    load = checks.load

    def moved(directory, **settings):
        model = load(directory, **settings)
        if "device" in settings:
            model.get_submodule("model.layers.0.mlp.down_proj").bias = torch.nn.Parameter(torch.full((64,), 0.05))
        return model

    monkeypatch.setattr(checks, "load", moved)
    assert output(artifact_one_layer.directory, CPU) > checks.NEAR


@pytest.mark.slow
def test_all_checks_pass_on_the_cpu_or_nothing_is_measured(tmp_path, monkeypatch, capsys):
    found = check(CPU, tmp_path)
    assert {"columns of GPTQ: codes", "product W4A16 g128", "model in W4A16: output", "model in W4A8: output"} <= set(
        found
    )
    monkeypatch.setattr(quantizing, "require_gpu", lambda: None)
    monkeypatch.setattr(checks, "columns", lambda device: 0.5)
    assert quantizing.main("1.1B") == 1
    sentence = "nothing was measured, because columns of GPTQ: codes differs by 5.0e-01 where 1e-03 is allowed\n"
    assert capsys.readouterr().err == sentence
    monkeypatch.setattr(checks, "columns", lambda device: 1 / 0)
    with pytest.raises(ArithmeticError, match="because columns of GPTQ: codes failed: division by zero"):
        check(CPU, tmp_path)


def test_a_time_that_is_over_ends_what_is_at_work():
    deadline, start = Deadline(0.05), time.monotonic()
    assert deadline.measured("long", lambda: time.sleep(5)) is None
    assert deadline.measured("later", lambda: 1) is None
    assert time.monotonic() - start < 1
    assert deadline.missed == ["long", "later"]


def test_what_fails_is_told_and_the_next_is_measured():
    deadline = Deadline(60)

    def fail():
        raise QuantizeError("the run does not fit")

    assert deadline.measured("70B", fail) is None
    assert deadline.measured("8B", lambda: 3) == 3
    assert deadline.failures == {"70B": "the run does not fit"}


@pytest.mark.slow
def test_the_timeline_of_a_run_accounts_for_all_of_it(monkeypatch):
    monkeypatch.setitem(whole_run.RUNS, "tiny", (1, 3))
    monkeypatch.setattr(quantizing, "TOKENS", ())
    before = whole_run.quantize_model.__globals__["finish"]
    result = quantizing.measure(["tiny", "none"], CPU, Deadline(120), None, ROOF, samples=4, seqlen=32)
    (run,) = result["runs"]
    assert result["failures"] == ["none: 'none'"]
    phases = run["phases"].values()
    assert sum(phase["seconds"] - phase["aside"] for phase in phases) == pytest.approx(run["seconds"], rel=0.05)
    assert run["phases"]["write"]["aside"] > 0 and run["phases"]["read"]["aside"] > 0
    assert run["hidden"] == pytest.approx(run["reading_and_writing"] - run["waiting"])
    spans = run["spans"]
    assert run["seconds_whole"] > run["seconds"] - spans["before"] + 2 * spans["model.layers.0"]
    assert whole_run.quantize_model.__globals__["finish"] is before


def test_the_least_time_of_8b_is_its_products():
    """2 operations a weight and token, a half of 2 K² a token, and 2.5 times 2 N K² a layer."""
    d, f, tokens, peak = 4096, 14336, 128 * 2048, 1e12
    weights, squares = [(d + 2048, d), (d, d), (2 * f, d), (d, f)], [d, d, d, f]
    each = sum(2 * tokens * N * K + 5 * N * K * K for N, K in weights) + sum(tokens * K * K for K in squares)
    assert least_seconds("8B", 32, tokens, Roof(1e15, peak, peak)) == pytest.approx(32 * each / peak)
