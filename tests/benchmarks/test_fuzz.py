"""Broken files of every kind, read by the commands: a minute of `make fuzz`, and what the mutations do."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections import Counter

import pytest
from safetensors import SafetensorError

from benchmarks.fuzz import __main__ as fuzz
from benchmarks.fuzz.mutations import KINDS, broken, json_value
from quantize.errors import QuantizeError


@pytest.mark.slow
def test_broken_files_of_every_kind_end_cleanly():
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.fuzz", "110", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr + done.stdout
    rows = re.findall(r"(?m)^│ ([a-z]+) +│ (\d+) +│ (\d+)", done.stdout)
    assert [kind for kind, *_ in rows] == list(KINDS)
    assert all(int(files) >= 9 for _, files, _ in rows)
    assert sum(int(sound) for *_, sound in rows) < 60  # the mutations do break most


def test_tables_of_several_seeds_are_recorded_as_their_sum(monkeypatch, tmp_path):
    monkeypatch.setattr(fuzz, "RESULTS", tmp_path)
    fuzz.record(7, {"text": fuzz.Tally(Counter({0: 2, 1: 3}), [], 1.5, 20_000_000)})
    fuzz.record(8, {"text": fuzz.Tally(Counter({1: 4}), ["text 0: no end"], 2.5, 10_000_000)})
    written = (tmp_path / "fuzz.md").read_text()
    assert "broke 9 files (seeds 7, 8), of which 1 were not answered cleanly" in written
    assert "| text | 9 | 2 | 7 | 0 | 1 | 2.5 | 20 |" in written


def test_a_mutation_is_told_by_its_seed_and_changes_one_value():
    sound = {"a": [1, {"b": 2}], "c": {"d": None}}
    made = [json.dumps(json_value(sound, random.Random(seed))) for seed in range(50)]
    assert made == [json.dumps(json_value(sound, random.Random(seed))) for seed in range(50)]
    assert len(set(made)) > 20
    assert sound == {"a": [1, {"b": 2}], "c": {"d": None}}


def test_every_kind_of_a_model_is_broken_in_a_copy(one_layer, tmp_path, tree):
    before = tree(one_layer)
    for kind in ("recipe", "config", "weights", "tokenizer"):
        for seed in range(8):
            folder = tmp_path / f"{kind}-{seed}"
            folder.mkdir()
            try:
                arguments = broken(kind, {"model": one_layer}, folder, random.Random(seed))
            except (SafetensorError, QuantizeError):
                continue
            assert "--output-dir" in arguments
    assert tree(one_layer) == before
