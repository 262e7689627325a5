"""Progress: what a person sees on a terminal, in a file, and without a console."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from quantize.pipeline.progress import JsonConsole, named_steps, track


def shown(terminal):
    log = io.StringIO()
    return log, Console(file=log, width=100, force_terminal=terminal)


def test_named_steps_are_lines_in_a_file():
    log, console = shown(terminal=False)
    with named_steps(["reading", "writing"], "exporting", console) as begin:
        begin("reading")
        assert log.getvalue() == "exporting 1/2 reading\n"
        begin("writing")
    assert log.getvalue() == "exporting 1/2 reading\nexporting 2/2 writing\n"


def test_named_steps_are_a_bar_on_a_terminal_and_nothing_without_a_console(capfd):
    log, console = shown(terminal=True)
    with named_steps(["reading", "writing"], "exporting", console) as begin:
        begin("reading")
        begin("writing")
    assert "exporting writing" in log.getvalue()
    assert "1/2" in log.getvalue()
    with named_steps(["reading"], "exporting", None) as begin:
        begin("reading")
    assert capfd.readouterr() == ("", "")


def test_a_step_that_is_not_next_is_an_error_of_the_program():
    with pytest.raises(AssertionError), named_steps(["reading", "writing"], "exporting", None) as begin:
        begin("writing")


def test_the_time_left_is_told_of_items_that_are_alike():
    log, console = shown(terminal=False)
    assert list(track([1, 2], "counting", str, console)) == [1, 2]
    assert log.getvalue() == "counting 1/2 1\ncounting 2/2 2, 0 s left\n"


def test_a_program_reads_one_object_a_line(capsys):
    console = JsonConsole()
    list(track([1, 2], "counting", lambda x: f"model.{x}", console))
    list(track([1], "reading", str, console, forecast=False))
    console.print("two\nlines of [text]", soft_wrap=True, markup=False)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    step = {"event": "step", "what": "counting", "name": "model.1", "number": 1, "of": 2, "seconds_left": None}
    assert found[0] == step
    assert found[1]["seconds_left"] == pytest.approx(0, abs=1)
    assert (found[2]["what"], found[2]["seconds_left"]) == ("reading", None)
    assert found[3] == {"event": "message", "text": "two\nlines of [text]"}
