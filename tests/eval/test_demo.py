"""`make demo`: it says how long it takes, and each result when it is known."""

from __future__ import annotations

import re

import pytest

from quantize.eval import demo


@pytest.mark.slow
def test_the_demo_prints_each_result_and_then_all(monkeypatch, capsys):
    monkeypatch.setattr(demo, "ARTIFACTS", [("W8A8", "RTN")])
    monkeypatch.setattr(demo, "WINDOWS", 2)
    monkeypatch.setenv("COLUMNS", "120")
    demo.main()
    shown = capsys.readouterr()
    first, second, *rest = shown.out.splitlines()
    assert first == "books-llama-6m, integer weights per channel, 2 windows of 256 unseen tokens"
    assert re.match(r"2 artifacts are made and measured, which takes about \w+ minutes on two cores", second)
    results = [line for line in rest if re.match(r"(as it is|planted), W8A8 RTN: increase [+-]\d\.\d{4}, KL ", line)]
    assert len(results) == 2
    assert re.search(r"as it is +float +\d\.\d{4} +11,547,040", shown.out)
    assert "measuring 2/2 planted W8A8 RTN, " in shown.err
