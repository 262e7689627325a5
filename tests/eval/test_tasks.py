"""Tasks of lm-evaluation-harness on artifacts and float models, offline, with a task file made of bundled text."""

import json
import sys

import pytest

TASK = """\
task: next_words
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list:
  - metric: acc
"""


@pytest.fixture
def task(books_heldout, tmp_path):
    """Write a task of eight documents: does a text go on in English, or in words that are spelled backwards?"""
    words = books_heldout.read_text().split()[:160]
    pieces = [words[i : i + 10] for i in range(0, 160, 10)]
    rows = [
        {"context": " ".join(text), "choices": ["".join(f" {w[::step]}" for w in more) for step in (1, -1)]}
        for text, more in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "next_words.yaml").write_text(TASK.format(data=data))
    return tmp_path / "next_words.yaml"


def test_a_task_of_ones_own_is_measured_without_a_network(cli, books, artifact_books, task, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(task.parent / "cache"))
    shown = cli("eval", artifact_books, "--against", books, "--tasks", task, "--json")
    assert shown.code == 0, shown.err
    found = json.loads(shown.out[shown.out.index("{") :])
    assert found["next_words.acc"] == found["next_words.acc_against"] == 1
    unknown = cli("eval", books, "--tasks", "no_such_task")
    assert (unknown.code, "no task 'no_such_task'" in unknown.err) == (2, True)


@pytest.fixture
def artifact_books(books, small_run):
    """Quantize a model that knows English, by plain rounding."""
    recipe = {"passes": [], "quantizer": {"name": "rtn"}}
    return small_run(books, scheme="W8A8", recipe=recipe).directory


def test_without_lm_eval_a_sentence_says_what_to_install(cli, books, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    shown = cli("eval", books, "--tasks", "hellaswag")
    assert shown.code == 2
    assert "pip install 'quantize-model[eval]'" in shown.err


def test_eval_takes_either_a_text_or_tasks(cli, books, books_heldout):
    for given in ([], ["--text", books_heldout, "--tasks", "piqa"], ["--tasks", "piqa", "--kurtosis"]):
        shown = cli("eval", books, *given)
        assert (shown.code, "give either --text FILE or --tasks NAMES" in shown.err) == (2, True)


def test_a_task_file_names_its_task(tmp_path):
    from quantize.errors import UsageError
    from quantize.eval.tasks import task_name

    (tmp_path / "a.yaml").write_text("output_type: x\n")
    (tmp_path / "b.yaml").write_text("group: x\ntask: mine\ndoc: !function code.run\n")
    assert task_name(tmp_path / "b.yaml") == "mine"
    with pytest.raises(UsageError, match="names no task"):
        task_name(tmp_path / "a.yaml")
    with pytest.raises(UsageError, match="no such task file"):
        task_name(tmp_path / "c.yaml")
