"""The bench of real models: which cells are left, ids that all share, cells that fail, and the tables by hand."""

import json
import sys

import pytest
import torch
from click.testing import CliRunner

from benchmarks.models import bench, run
from benchmarks.models.cells import (
    DEFAULT,
    FLOAT,
    MODELS,
    PEERS,
    PLAIN,
    SCHEMES,
    TUNED,
    BenchModel,
    Cell,
    cells_of,
    changes,
    missing,
)
from benchmarks.models.report import markdown, short_table
from benchmarks.models.windows import write_calibration, write_evaluation
from quantize.calibration.tensor_samples import read_calibration
from quantize.checkpoint.tokenizer import load_tokenize
from quantize.graph.inputs import Input
from quantize.recipe.recipe import load_recipe

GPTQ, QUIP = "llm-compressor: GPTQ, dynamic int4", "llm-compressor: QuIP, GPTQ"
BOOKS = MODELS["books-llama-6m"].directory(None)


def row(recipe, loss, kl=0.5, scheme="W4A4", **more):
    scores = {"heldout": {"loss": loss, "kl": kl, "top1": 0.25}}
    found = {"model": "books-llama-6m", "scheme": scheme, "recipe": recipe, "texts": scores, "machine": "a CPU"}
    return found | {"seconds": 90.0, "peak_mb": 1500.0, "artifact_mb": 12.0, "continuation": "a\n`b"} | more


FLOAT_ROW = row("", 4.0, scheme=FLOAT, texts={"heldout": {"loss": 4.0}})


def test_cells_of_a_model():
    """Six schemes plainly and by default, three tuned if the model is small, other tools if they are there."""
    assert len(cells_of("Gemma-3-270m", False)) == 1 + 6 * 2
    assert len(cells_of("books-llama-6m", True)) == 1 + 6 * 2 + 3 + len(PEERS)
    assert len(cells_of("MiniLM", True)) == 1 + 6 * 2 + 3
    assert cells_of("Gemma-3-270m", True)[0] == ("Gemma-3-270m", FLOAT, "")


def test_every_recipe_of_ours_is_one():
    for scheme in SCHEMES:
        plain = load_recipe(scheme, changes(Cell("", scheme, PLAIN)))
        assert (plain.passes, plain.quantizer) == ((), {"name": "rtn"})
        assert plain.weights.symmetric
        assert load_recipe(scheme, changes(Cell("", scheme, DEFAULT))) == load_recipe(scheme, None)
    assert changes(Cell("", "W4A8", TUNED)) == "w4a8-tuned"


def test_what_is_measured_is_not_measured_again():
    wanted = cells_of("books-llama-6m", True)
    rows = [FLOAT_ROW, row(DEFAULT, 4.1), {**row(QUIP, 0.0), "error": "refused", "texts": {}}]
    left = missing(rows, wanted, ["heldout"])
    assert set(wanted) - set(left) == {
        wanted[0],
        Cell("books-llama-6m", "W4A4", DEFAULT),
        ("books-llama-6m", "W4A4", QUIP),
    }
    again = missing(rows, wanted, ["heldout", "another"])
    assert set(wanted) - set(again) == {("books-llama-6m", "W4A4", QUIP)}


def test_tables_by_hand():
    rows = [FLOAT_ROW, row(PLAIN, 4.5), row(DEFAULT, 4.125), row(GPTQ, 4.25, 0.3), row(QUIP, 4.375, 0.2)]
    lines = markdown([*rows, row(TUNED, 0.0, texts={}, error="a | b")]).splitlines()
    assert "| W4A4 | +0.5000 → +0.1250; +0.3750 (QuIP, GPTQ) |" in lines
    assert "| float |  | (loss 4.0000) |  |  | 12.0 | 1.5 | 1.50 |" in lines
    assert f"| W4A4 | {GPTQ} | +0.2500 | 0.3000 | 0.250 | 12.0 | 1.5 | 1.50 |" in lines
    assert "| W4A4 | tuned | no figures: a / b |  |  |  |  |  |" in lines
    assert "- W4A4 default: `a⏎'b`" in lines


def test_the_short_table_says_what_is_missing():
    assert short_table([FLOAT_ROW, row(DEFAULT, 4.125)])[2:] == ["| W4A4 | ? → +0.1250 |"]
    encoder = {"model": "MiniLM", "texts": {"a": {"retained": 0.985, "distance": 0.02}}}
    assert short_table([row(PLAIN, 0.0, **encoder), row(DEFAULT, 0.0, **encoder)])[2:] == ["| W4A4 | 98.5% → 98.5% |"]


def test_all_see_the_ids_that_the_package_takes_by_default(tmp_path):
    path = tmp_path / "calibration.jsonl"
    write_calibration(BOOKS, path, 3, 64)
    takes = {"input_ids": Input(torch.zeros(1, 64, dtype=torch.int64), ())}
    expected, found = (read_calibration(file, takes, 64, 3, load_tokenize(BOOKS), 4096) for file in (None, path))
    assert [r["input_ids"].tolist() for r in found.rows] == [r["input_ids"].tolist() for r in expected.rows]
    assert run.windows_of(path) == (3, 64)


@pytest.mark.parametrize("begins", [False, True])
def test_windows_begin_as_the_tokenizer_begins(begins, stories, tmp_path):
    """That of the books puts no token in front of a text, that of the stories puts one."""
    write_evaluation(stories if begins else BOOKS, tmp_path / "e.json", [bench.TEXT], 32, 2)
    found = json.loads((tmp_path / "e.json").read_text())
    windows = found["texts"]["heldout"]
    assert [len(ids) for ids in windows] == [32, 32]
    assert [ids[0] == 1 for ids in [*windows, found["prompt"]]] == [begins] * 3
    assert all(ids.count(1) == begins for ids in windows)


def test_a_process_that_fails_has_one_line():
    assert bench.run_command([sys.executable, "-c", "print('x'); print('{\"a\": 1}')"]) == {"a": 1}
    assert bench.run_command([sys.executable, "-c", "raise ValueError('too\\nmuch')"]) == {"error": "much"}
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert bench.run_command([sys.executable, "-c", killed]) == {"error": "ended by signal 9"}


def test_rows_are_written_after_each_cell_and_a_missing_model_is_skipped(tmp_path, monkeypatch):
    """The second run measures only what the first one did not."""
    asked = []

    def fake(command):
        asked.append(tuple(command[3:6]))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {name: row("", 4.0)[name] for name in ("texts", "artifact_mb", "seconds", "peak_mb", "continuation")}

    monkeypatch.setattr(bench, "run_command", fake)
    monkeypatch.setattr(
        bench, "MODELS", {"books-llama-6m": MODELS["books-llama-6m"], "Gemma-3-270m": BenchModel("none")}
    )
    arguments = [
        "--scheme",
        "W4A4",
        "--recipe",
        PLAIN,
        "--recipe",
        DEFAULT,
        "--models-dir",
        tmp_path,
        "--output",
        tmp_path,
    ]
    first = CliRunner().invoke(bench.main, list(map(str, arguments)))
    assert "Gemma-3-270m is skipped: --models-dir holds no none" in first.output
    assert [r["recipe"] for r in json.loads((tmp_path / "models.json").read_text())] == ["", PLAIN]
    second = CliRunner().invoke(bench.main, list(map(str, arguments)))
    assert second.exit_code == 0, second.output
    assert "1 of 1 cells, 0 minutes left" in second.output
    assert asked[2:] == [("books-llama-6m", "W4A4", DEFAULT)] * 2
    assert len(json.loads((tmp_path / "models.json").read_text())) == 3
    wrong = CliRunner().invoke(bench.main, ["--model", "nothing"])
    assert wrong.exit_code == 2
    assert "--model nothing is part of no model's name; known are books-llama-6m, Gemma-3-270m" in wrong.output


@pytest.mark.slow
def test_one_cell(tmp_path):
    """The scores of a language model against itself and of what was quantized, in this process."""
    write_calibration(BOOKS, tmp_path / "calibration.jsonl", 2, 64)
    write_evaluation(BOOKS, tmp_path / "evaluation.json", [bench.TEXT], 64, 2)
    base = run.measure(Cell("", FLOAT, ""), BOOKS, tmp_path, tmp_path / "no")
    found = run.measure(Cell("", "W8A8", PLAIN), BOOKS, tmp_path, tmp_path / "out")
    assert found["texts"]["heldout"]["loss"] == pytest.approx(base["texts"]["heldout"]["loss"], abs=0.02)
    assert 0 < found["texts"]["heldout"]["kl"] < 0.01
    assert found["artifact_mb"] < base["artifact_mb"]
    assert found["seconds"] > 0 < found["peak_mb"]
    assert len(base["continuation"]) > 24
