"""What the README and the documentation show is what happens."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from helpers.examples import commands, console_examples, difference, python_blocks

from quantize.cli import commands as group

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A directory in which the paths of the README lead where they do in a clone, and the environment for it."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "tests").symlink_to(ROOT / "tests")
    return folder


def run(arguments, folder):
    """Run a program of the README as on a narrow terminal, and return its exit code and what it printed, in order."""
    program = {"quantize-model": [sys.executable, "-W", "ignore", "-m", "quantize"], "python": [sys.executable]}
    command = [*program[arguments[0]], *arguments[1:]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1500
    )
    return done.returncode, done.stdout


@pytest.mark.slow
def test_the_readmes_examples_print_what_it_says(clone):
    """All in one test, since each reads what those before it have written."""
    examples = console_examples(README)
    assert [example.arguments[1] for example in examples] == ["tests/models/books-llama-6m", "eval", "export", "run"]
    for example in examples:
        code, printed = run(example.arguments, clone)
        assert code == 0, printed
        assert difference(example.printed, printed.splitlines()) == "", printed
    (program,) = python_blocks(README)
    code, printed = run(["python", "-W", "ignore", "-c", program], clone)
    assert code == 0, printed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_the_documentation_is_one(page):
    """Its name, its options and their values; paths may be none."""
    for arguments in commands(page):
        context = click.Context(group, info_name="quantize-model")
        name, command, rest = group.resolve_command(context, list(arguments))
        command.make_context(name, list(rest), parent=context)


def test_a_page_with_another_output_is_noticed():
    said = ["one 1.000", "…", "two 3,000 of…", "end"]
    assert difference(said, ["one 1.001", "x", "y", "two 3,001 of all", "end"]) == ""
    assert difference(said, ["one 1.001", "two 3,000 of all", "end"]) == ""
    assert "'one 1.000' is not" in difference(said, ["one 1.1", "two 3,000 of all", "end"])
    assert "'one 1.000' is not" in difference(said, ["zero", "one 1.000", "two 3,000 of all", "end"])
    assert "'two 3,000 of…' is not" in difference(said, ["one 1.000", "two 4,000 of all", "end"])
    assert "'end' is not" in difference(said, ["one 1.000", "two 3,000 of all"])
    assert "more was printed" in difference(said, ["one 1.000", "two 3,000 of all", "end", "and more"])
