"""The table of `make bench-gpu-run`, which needs a GPU to be measured."""

import os
import subprocess
import sys

import pytest
import torch

from benchmarks.gpu.quantizing import MARKS, NOT_YET, PAGE, ROOT, table, write

RUN = {"size": "8B", "layers": 2, "whole": 32, "seconds": 20.4, "seconds_whole": 150.2, "peak_bytes": 18.3e9,
       "phases": {"Gram": {"seconds": 1.25}, "forward": {"seconds": 4.0}}}  # fmt: skip
RESULT = {"gpu": "A GPU", "torch": "2.11", "runs": [RUN]}


def test_a_row_has_the_goal_and_each_phase():
    lines = table([RESULT]).splitlines()
    assert lines[2] == "| model | blocks run | all | whole model | goal | peak GB | Gram | forward |"
    assert lines[4] == "| 8B | 2 of 32 | 20 | 150 | 180 | 18.3 | 1.2 | 4.0 |"
    assert table([]) == NOT_YET


def test_what_is_written_stands_on_the_page(tmp_path):
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / PAGE).parent.mkdir()
    (tmp_path / PAGE).write_text((ROOT / PAGE).read_text())
    write(tmp_path, RESULT)
    inside = (tmp_path / PAGE).read_text().split(MARKS[0])[1].split(MARKS[1])[0]
    assert "| 8B | 2 of 32 |" in inside


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_stops():
    command = [sys.executable, "-m", "benchmarks.gpu.quantizing"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2 and done.stderr.startswith("nothing was measured: torch finds no GPU here")
