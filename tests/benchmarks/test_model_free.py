"""The bench of rounding without the model's code, on a tiny model."""

import json

import pytest

from benchmarks.machine import Processor
from benchmarks.model_free import bench, run


def test_it_measures_a_run(tmp_path, monkeypatch, capsys):
    def here(command):
        run.main(*command[3:])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    monkeypatch.setattr(bench, "measured", here)
    rows = bench.bench("tiny", 2, ("minmax", "mse"), None, tmp_path)
    assert [row["scales"] for row in rows] == ["minmax", "mse"]
    assert all(row["peak_mb"] > 0 and row["cpu"] > 0 for row in rows)
    shown = bench.report(rows, Processor("a processor", 2, ()))
    assert "| tiny | 2 | 0.0 | searched | this | " in shown
    assert not (tmp_path / "out").exists()


def test_a_size_that_is_unknown(tmp_path):
    with pytest.raises(KeyError):
        bench.bench("7B", 1, ("minmax",), None, tmp_path)
