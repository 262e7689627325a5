"""Files of statistics that somebody else made: every number and every key is checked before it is used."""

from __future__ import annotations

import json
import random

import pytest
import torch
from helpers.mutations import cut_up, grafted, taken
from safetensors import safe_open
from safetensors.torch import save_file

from quantize.calibration.statistics import Absmax, Gram, Rows
from quantize.errors import UsageError
from quantize.pipeline.serialization import save_state
from quantize.pipeline.statistics_files import StatisticsFile, merge_stats, read_collected, write_collected


def rows(value, absmax=None):
    return Rows(value, Absmax(value.abs().amax(0) if absmax is None else absmax))


def written(path, part="a", write=write_collected, **statistics):
    given = {name: rows(torch.ones(3, 4)) for name in ("up.weight", "down.weight")} | statistics
    identity = {"model": {"model.safetensors": "0"}, "recipe": {"seed": "1"}}
    write(path, StatisticsFile(identity, {part: {"rows": 1, "tokens": 8}}, 0, given))
    return path


def unchecked(path, found):
    """Write what nobody has checked."""
    save_state(path, vars(found))


def with_value(value):
    return torch.ones(3, 4).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(value))


WRONG = [
    (rows(with_value(float("nan")), torch.ones(4)), r"a row holds nan at \[1, 2\]"),
    (rows(with_value(float("-inf")), torch.ones(4)), r"a row holds -inf at \[1, 2\]"),
    (rows(torch.ones(3, 4), torch.tensor([1.0, 2.0, float("nan"), 0.0])), r"absmax holds nan at \[2\]"),
    (rows(torch.ones(3, 4), torch.tensor([1.0, float("inf"), 0.0, 0.0])), r"absmax holds inf at \[1\]"),
    (rows(torch.ones(3, 4), torch.tensor([-1.0, 0.0, 0.0, 0.0])), r"absmax holds -1.0 at \[0\]"),
    (rows(torch.ones(3, 4), torch.ones(5)), r"rows \[3, 4\] beside the magnitudes of 5 channels"),
    (rows(torch.ones(3, 4), torch.ones(4, 1)), r"absmax is \[4, 1\] of torch.float32"),
    (rows(torch.ones(3, 4), torch.ones(4, dtype=torch.int8)), r"absmax is \[4\] of torch.int8"),
    (rows(torch.ones(3, 4, dtype=torch.float64)), "the rows are of torch.float64, and digests are those of"),
    (rows(torch.ones(3, 4, dtype=torch.float16)), "the rows are of torch.float16, and digests are those of"),
    (rows(torch.ones(600, 4)), r"rows \[600, 4\] beside"),
    (Rows(torch.ones(3, 4), 5), "absmax is 5, which is no statistic"),
    (Rows("x", Absmax(torch.ones(4))), "a row is 'x'"),
    (Absmax(torch.ones(4)), "no statistic like the others"),
    (7, "is 7, no statistic like the others"),
]


@pytest.mark.parametrize(("wrong", "words"), WRONG)
def test_numbers_that_cannot_have_been_seen_are_named(wrong, words, tmp_path):
    written(tmp_path / "a")
    written(tmp_path / "b", "b", unchecked, **{"down.weight": wrong})
    with pytest.raises(UsageError, match=rf"b: (of )?'down.weight' .*{words}"):
        read_collected(tmp_path / "b")
    with pytest.raises(UsageError, match=words):
        merge_stats([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_run_does_not_write_them_either(tmp_path):
    with pytest.raises(UsageError, match=r"of 'up\.weight' absmax holds nan"):
        written(tmp_path / "a", **{"up.weight": rows(torch.full((3, 4), float("nan")))})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("gram", "words"),
    [
        (Gram(torch.ones(3, 4)), "not square"),
        (Gram(torch.ones(3, 3), drift=torch.ones(4, 4)), "not square"),
        (Gram(torch.ones(3, 3), rows=-1), "rows is -1"),
        (Gram(torch.full((3, 3), float("inf"))), "a sum holds inf"),
        (Gram(torch.ones(3, 3), rows=True), "rows is True"),
    ],
)
def test_sums_are_checked(gram, words):
    assert Gram(torch.ones(3, 3), 5, torch.zeros(3, 3)).check() == 3
    with pytest.raises(ValueError, match=words):
        gram.check()


def test_files_of_other_tensors_are_not_merged(tmp_path):
    written(tmp_path / "a")
    written(tmp_path / "b", "b", **{"down.weight": rows(torch.ones(3, 5))})
    written(tmp_path / "c", "c", other=rows(torch.ones(3, 4)))
    written(tmp_path / "d", "d", **{"down.weight": Rows()})
    for name in ("b", "c"):
        with pytest.raises(UsageError, match=f"{name} holds statistics of other tensors than .*a; collect them alike"):
            merge_stats([tmp_path / "a", tmp_path / name], tmp_path / "out")
    assert merge_stats([tmp_path / "d", tmp_path / "a"], tmp_path / "out").statistics["down.weight"].check() == 4


def test_hundreds_of_broken_files_end_in_a_sentence(tmp_path):
    rng, path = random.Random(6), written(tmp_path / "a")
    written(tmp_path / "b", "b")
    sound = path.read_bytes()
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    counts = {True: 0, False: 0}
    for number in range(400):
        (tmp_path / "out").unlink(missing_ok=True)
        if number % 2:
            path.write_bytes(cut_up(sound, rng))
        else:
            description = json.dumps(grafted(json.loads(header["stored"]), rng))
            try:
                save_file(tensors, path, {"stored": description})
            except UnicodeEncodeError:
                continue
        counts[taken(lambda: merge_stats([path, tmp_path / "b"], tmp_path / "out"))] += 1
    assert counts[False] > 200, counts
