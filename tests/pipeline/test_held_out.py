"""Rows that a run did not see judge its result against the float model and against plain rounding."""

import math

import pytest
import torch

from quantize.calibration.data import Samples
from quantize.calibration.logits import divergence
from quantize.checkpoint.opening import open_checkpoint
from quantize.errors import UsageError
from quantize.pipeline.held_out import hold_out
from quantize.pipeline.prepare import prepare
from quantize.pipeline.steps.referee import Referee
from quantize.quantizers.gptq import GPTQ
from quantize.recipe.recipe import load_recipe


def samples(count, length=64, words=1000, seed=0):
    rng = torch.Generator().manual_seed(seed)
    rows = tuple({"input_ids": torch.randint(words, (length,), generator=rng)} for _ in range(count))
    return Samples(rows, "hash")


def read_tensors(directory):
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


def prose():
    return samples(2, seed=1)


def test_one_row_in_sixteen_is_held_back_evenly_spread():
    given = samples(64)
    rest, held = hold_out(given, True, prose)
    assert [[row is x for x in given.rows].index(True) for row in held.rows] == [8, 24, 40, 56]
    assert len(rest.rows) == 60
    assert held.source == "calibration data"


def test_few_rows_are_all_calibrated_on_and_other_text_judges():
    for given in (samples(1), samples(7), samples(16, words=2)):
        rest, held = hold_out(given, True, prose)
        assert rest is given
        assert (held.source, len(held.rows)) == ("bundled prose", 2)


def test_other_text_judges_only_by_windows_that_the_run_does_not_see():
    given, other = samples(4), samples(40)
    assert all(any(torch.equal(a["input_ids"], b["input_ids"]) for b in other.rows) for a in given.rows)
    held = hold_out(given, True, lambda: other)[1]
    assert len(held.rows) == 4
    assert not any(torch.equal(a["input_ids"], b["input_ids"]) for a in given.rows for b in held.rows)


def test_a_tokenizer_that_does_not_fit_the_model_is_no_reason_to_stop():
    def wrong():
        raise UsageError("the token id 900; the model knows 0 to 63")

    assert len(hold_out(samples(4), True, wrong)[1].rows) == 1


def test_without_a_tokenizer_one_of_three_rows_is_held_back():
    rest, held = hold_out(samples(3), False, None)
    assert (len(rest.rows), len(held.rows)) == (2, 1)
    assert hold_out(samples(2), False, None)[1].rows == ()


def test_divergence_by_hand():
    """Two tokens over two words: log(1/2) against log(1/4) and log(3/4)."""
    half, quarter = torch.tensor([[0.0, 0.0]] * 2), torch.tensor([[0.25, 0.75]] * 2).log()
    found = divergence(quarter, half, torch.tensor([0, 1]))
    assert found.tokens == 2
    assert found.loss == pytest.approx(-math.log(3 / 16))
    assert found.reference_loss == pytest.approx(2 * math.log(2))
    assert found.mean("kl") == pytest.approx(math.log(1 / 2) - math.log(3 / 16) / 2)


def test_the_manifest_says_what_unseen_rows_lose(stories, stories_calibration, small_run):
    settings = {"nsamples": 16, "seqlen": 64}
    found = small_run(stories, "W4A8", **settings).manifest["held_out"]
    (row,) = prepare(stories, load_recipe("W4A8", None, **settings), stories_calibration).held_out.rows
    with torch.no_grad():
        loss = open_checkpoint(stories).load()(row["input_ids"][None], labels=row["input_ids"][None]).loss
    assert abs(found["float"]["loss"] - float(loss)) < 1e-4
    assert (found["source"], found["rows"], found["tokens"], found["warning"]) == ("calibration data", 1, 64, "")
    assert 0 < found["quantized"]["kl"] < found["plain_rounding"]["kl"]


@pytest.fixture
def broken_gptq(monkeypatch):
    """Let GPTQ round weights that are half as large again."""
    rounding = GPTQ.quantize_weights
    monkeypatch.setattr(
        GPTQ, "quantize_weights", lambda self, weights, *args: rounding(self, [W * 1.5 for W in weights], *args)
    )


@pytest.mark.usefixtures("broken_gptq")
def test_linears_that_lose_by_calibration_are_rounded_plainly(stories, small_run):
    found = small_run(stories, "W4A8", nsamples=16, seqlen=64).manifest
    assert set(found["held_out"]["rounded_plainly"]) == found["quantization"]["modules"].keys() - {"lm_head"}


def test_a_block_that_loses_by_tuning_stays_as_it_was(one_layer, small_run):
    """Steps of half the format's range leave nothing of the weights; such a run gives the integers of one without."""
    arguments = {"nsamples": 16, "seqlen": 64}
    plain = small_run(one_layer, "W4A16", "plain", **arguments)
    found = small_run(one_layer, "W4A16", recipe={"tune": {"steps": 5, "learning_rate": 8.0}}, **arguments)
    assert found.manifest["held_out"]["not_tuned"] == ["model.layers.0"]
    assert read_tensors(found.directory) == read_tensors(plain.directory)


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_a_run_that_has_nothing_to_judge_by_says_nothing(quantizer, variant, small_run):
    """Neither one without calibration data, nor one of two rows whose model has no tokenizer to read other text."""
    model = variant()
    for path in model.glob("tokenizer*"):
        path.unlink()
    artifact = small_run(model, "W4A16", recipe={"passes": [], "quantizer": {"name": quantizer}})
    assert "held_out" not in artifact.manifest
    assert artifact.warning == ""


def test_calibration_is_kept_where_it_helps(stories, small_run):
    found = small_run(stories, "W4A8", nsamples=64, seqlen=128).manifest
    assert len(found["held_out"].get("rounded_plainly", [])) < len(found["quantization"]["modules"]) / 4


@pytest.mark.usefixtures("broken_gptq")
def test_a_result_worse_than_plain_rounding_is_a_warning_and_fails_if_strict(
    cli, stories, stories_calibration, tmp_path, monkeypatch
):
    monkeypatch.setattr(Referee, "choose", lambda self, part, block, weights, *_: weights)
    options = ["--scheme", "W4A8", "--calibration", stories_calibration, "--nsamples", 16, "--seqlen", 16]
    shown = cli(stories, *options, "--output-dir", tmp_path / "a")
    warning = "warning: plain rounding is as near to the float model or nearer: 256 calibration tokens are few"
    assert shown.code == 0
    assert warning in shown.err
    assert "that the run did not see: loss " in shown.out
    shown = cli(stories, *options, "--output-dir", tmp_path / "b", "--strict")
    assert shown.code == 1
    assert warning in shown.err
    assert (tmp_path / "b").exists()
