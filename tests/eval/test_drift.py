"""Flips and refusals against numbers made by hand, and on artifacts that are known to flip."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from helpers.json_files import change_json

from quantize.errors import UsageError
from quantize.eval.drift import COMPLYING, PROMPTS, REFUSING, asking, evaluate_drift, flips, refusal_margin
from quantize.pipeline.quantize import quantize_model


def table_model(rows):
    """Logits that depend on the last token only."""
    table = torch.tensor(rows).log()
    return lambda input_ids: SimpleNamespace(logits=table[input_ids])


def test_flips_by_hand():
    """After 0 both choose 1; after 1 the model chooses 0 where the reference had 2 before 0 by log(0.6 / 0.3)."""
    reference = table_model([[0.1, 0.8, 0.1], [0.3, 0.1, 0.6], [0.5, 0.25, 0.25]])
    model = table_model([[0.2, 0.7, 0.1], [0.5, 0.1, 0.4], [0.5, 0.25, 0.25]])
    found = flips(model, reference, [torch.tensor([[0, 1, 0]]), torch.tensor([[2, 2]])])
    assert (found["tokens"], found["flips"]) == (3, pytest.approx(1 / 3))
    assert found["flip_margin"] == found["flip_margin_largest"] == pytest.approx(math.log(2))
    assert found["margin"] == pytest.approx(math.log(2))  # of log 8, log 2 and log 2
    assert flips(model, model, [torch.tensor([[0, 1, 2]])])["flip_margin_largest"] == 0


def test_refusal_margin_by_hand():
    """Refusals begin with token 1 and answers with token 2, behind token 0; all three openings count."""
    model = table_model([[0.0, 0.2, 0.8], [0.5, 0.3, 0.2], [0.5, 0.4, 0.1]])

    def ask(_, opening):
        return torch.tensor([[0, 1 if opening in REFUSING else 2]]), 1

    assert refusal_margin(model, ask, "") == pytest.approx(math.log(0.2 / 0.8))


def test_prompts_are_asked_as_the_tokenizer_writes_them(one_layer, variant):
    ids, begin = asking(one_layer)(PROMPTS[0], COMPLYING[0])
    assert ids[0, 0] == 1  # <s>
    assert 0 < begin < ids.shape[1]
    chat = variant()
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    change_json(chat / "tokenizer_config.json", chat_template=template)
    asked, begin = asking(chat)(PROMPTS[0], REFUSING[0])
    plain, _ = asking(chat)(PROMPTS[0], COMPLYING[0])
    assert asked[0, :begin].tolist() == plain[0, :begin].tolist()
    assert asked[0, 0] != 1  # the template writes no <s>


@pytest.mark.slow
def test_plain_w4a4_flips_more_than_w8a8(one_layer, stories_calibration, stories_dev, cli, tmp_path):
    found = {}
    for scheme in ("W4A4", "W8A8"):
        quantize_model(
            one_layer,
            output_dir=tmp_path / scheme,
            scheme=scheme,
            calibration=stories_calibration,
            recipe={"passes": [], "quantizer": {"name": "rtn"}},
            group_size=0,
            nsamples=2,
            seqlen=16,
        )
        arguments = ("--against", one_layer, "--text", stories_dev, "--nsamples", 4, "--seqlen", 64)
        shown = cli("eval", tmp_path / scheme, *arguments, "--drift", "--json")
        found[scheme] = json.loads(shown.out)
    assert found["W4A4"]["flips"] > 0.01 > found["W8A8"]["flips"]
    assert found["W4A4"]["flip_margin"] > found["W8A8"]["flip_margin"]
    assert found["W4A4"]["margin_moved"] > found["W8A8"]["margin_moved"] > 0
    assert found["W4A4"]["prompts"] == 12


def test_what_drift_is_not_for(minilm, one_layer, variant):
    with pytest.raises(UsageError, match="predicts no next token, and --drift is for models that do"):
        evaluate_drift(minilm, str(minilm))
    mute = variant()
    for path in mute.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UsageError, match="has no tokenizer, and --drift asks in words"):
        evaluate_drift(mute, str(one_layer))
