"""Progress: what a person sees on a terminal, in a file, and without a console."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from quantize.pipeline.progress import named_steps, track


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
