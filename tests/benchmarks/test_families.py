"""The benchmark of families: cells are figures or sentences, and the table says what is wrong."""

from __future__ import annotations

import pytest
import transformers

from benchmarks.families.bench import finished
from benchmarks.families.families import FAMILIES, MODULE
from benchmarks.families.report import markdown
from benchmarks.families.run import AS_IT_IS, CRASH, attempt, measure
from quantize.errors import QuantizeError


def test_there_are_eighty_families_of_classes_that_transformers_has():
    assert len(FAMILIES) >= 80
    named = [x.architecture for x in FAMILIES.values() if x.kind != MODULE and x.architecture]
    assert all(hasattr(transformers, name) for name in named)
    assert AS_IT_IS["quantizer"] == {"name": "rtn"}


def test_a_family_end_to_end(tmp_path):
    found = measure("nn.Linear", tmp_path, onnx=False)
    assert found["quantized"] > 0.97
    assert all(0 < found[f"{scheme} default"] < found[f"{scheme} plain rounding"] < 0.1 for scheme in ("W4A8", "W4A4"))
    assert (found["exported"], found["load"], found["verify"], found["generate"]) == ("yes", "yes", "yes", "")
    assert found["compressed-tensors"].startswith("W4A8 plain rounding is of a module that transformers does not know")
    assert not finished(found)
    assert finished(found | {"onnx": "yes"})


@pytest.mark.parametrize(
    ("error", "cell"),
    [
        (QuantizeError("/tmp/1/float holds no tensor x"), "float holds no tensor x"),
        (QuantizeError("one\ntwo"), CRASH + "several lines: one"),
        (KeyError("x"), CRASH + "KeyError: 'x'"),
    ],
)
def test_a_cell_is_a_sentence_or_says_that_it_is_none(error, cell):
    def fail():
        raise error

    cells = {}
    assert attempt(cells, "load", fail) is None
    assert cells == {"load": cell}


def test_the_table_counts_what_is_wrong():
    fine = {"family": "llama", "quantized": 0.99, "exported": "yes", "W4A8 plain rounding": 0.2, "W4A8 default": 0.1}
    worse = {**fine, "family": "qwen2", "W4A8 default": 0.3, "onnx": "it is refused", "load": "yes", "seconds": 2.4}
    crash = {"family": "bert", "quantized": CRASH + "KeyError: 'x'"}
    text = markdown([fine, worse, crash])
    assert "Cells that crashed instead of saying why not: 1. Defaults more than 1.1 times as far" in text
    assert "which tables in 8 bits make alone: 1 of 2." in text
    assert f"The command has not come yet to {len(FAMILIES) - 3}: qwen3; mistral; " in text
    assert "| qwen2 | 99.0% | 0.200 → 0.300 |  | yes |  |  | (1) |  | 2 |" in text
    assert "\n1. it is refused\n" in text
