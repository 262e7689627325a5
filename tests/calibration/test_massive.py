"""Massive activations: the rules by numbers a hand can check, and exactly what was injected is listed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from helpers.soundness import CONFIGS
from safetensors.torch import load_file, save_file

from quantize.calibration.massive import Activation, HiddenStateStats, outlier_ratios

EMBEDDING, TOKEN, CHANNEL = "model.embed_tokens.weight", 426, 30


def test_the_token_rule_by_hand():
    M = torch.tensor([[1.0, 2.0, 3.0, 195.0, 0.2], [1.0, 1.0, 1.0, 64.0, 65.0]])
    x = torch.stack([M / 2, -M], dim=-1)  # the maximum is over magnitudes
    assert torch.allclose(outlier_ratios(x), M / torch.tensor([[2.0], [1.0]]))
    hidden = HiddenStateStats("block")
    hidden.update(x, torch.arange(10).reshape(2, 5))
    assert dict(hidden.tokens) == {3: 1, 9: 1}  # 97.5 and 65, but neither 64 nor 32
    assert dict(hidden.small) == {4: 1}  # a tenth, but not a half


@pytest.mark.parametrize(
    ("value", "ratio", "massive", "large"),
    [(101, 1000, True, True), (100, 1000, False, True), (101, 999, False, False), (2, 5000, False, True)],
)
def test_the_massive_rule_needs_both_and_the_other_the_ratio_alone(value, ratio, massive, large):
    found = Activation(value, ratio, row=0, position=0, token=0, channel=0)
    assert (found.massive, found.large) == (massive, large)


def test_the_largest_are_named_with_their_place_over_several_batches():
    hidden, h = HiddenStateStats("block"), torch.full((2, 4, 3), 0.1)
    h[1, 2, 0], h[0, 3, 1], h[0, 0, 2] = -300.0, 200.0, 50.0
    hidden.update(h, torch.tensor([[5, 6, 7, 8], [5, 6, 9, 8]]))
    more = torch.full((1, 2, 3), 0.2)
    more[0, 1, 0] = -400.0
    hidden.update(more, torch.tensor([[5, 9]]))
    places = [(a.value, a.row, a.position, a.token, a.channel) for a in hidden.top]
    assert places == [(400.0, 2, 1, 9, 0), (300.0, 1, 2, 9, 0), (200.0, 0, 3, 8, 1)]
    assert [a.ratio for a in hidden.top] == pytest.approx([2000, 3000, 2000])
    assert hidden.median == pytest.approx((0.1 + 0.1 + 0.2) / 3)
    assert {place: count for place, (_, count) in hidden.large.items()} == {(9, 0): 2, (8, 1): 1}


@pytest.fixture
def injected(variant):
    """One token id carries 500 in one channel of the residual stream."""
    model = variant()
    weights = load_file(model / "model.safetensors")
    weights[EMBEDDING][TOKEN, CHANNEL] = 500.0
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    return model


@pytest.mark.slow
def test_exactly_what_was_injected_is_listed(cli, injected, stories_calibration):
    shown = cli("inspect", injected, "--activations", "--calibration", stories_calibration, "--json")
    found = json.loads(shown.out)
    assert [block["block"] for block in found] == ["head", "model.layers.0"]  # scores are no hidden state
    lines = stories_calibration.read_text().splitlines()
    rows = [json.loads(lines[i * len(lines) // 10])["input_ids"][:512] for i in range(10)]
    for block in found:
        assert [(a["token"], a["channel"]) for a in block["massive"]] == [(TOKEN, CHANNEL)]
        assert [(a["token"], a["channel"]) for a in block["large"]] == [(TOKEN, CHANNEL)]
        assert [(a["token"], a["count"]) for a in block["tokens"]] == [(TOKEN, sum(r.count(TOKEN) for r in rows))]
        assert block["massive"][0]["count"] == sum(row.count(TOKEN) for row in rows)
        for a in block["top"]:
            assert rows[a["row"]][a["position"]] == TOKEN
            assert a["value"] == pytest.approx(500, rel=0.02)
            assert a["ratio"] == pytest.approx(a["value"] / block["median"], rel=0.2)


@pytest.mark.slow
def test_a_table_and_nothing_flagged_in_a_plain_model(cli, injected, one_layer, stories_calibration, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    arguments = ["--activations", "--calibration", stories_calibration]
    assert f"massive: {TOKEN}, {CHANNEL} (" in " ".join(cli("inspect", injected, *arguments).out.split())
    plain = json.loads(cli("inspect", one_layer, *arguments, "--json").out)
    assert not any(block[rule] for block in plain for rule in ("massive", "large", "tokens"))


@pytest.mark.slow
def test_what_cannot_be_shown(cli, one_layer, stories_calibration, tmp_path):
    shown = cli("inspect", one_layer, "--calibration", stories_calibration)
    assert (shown.code, shown.err) == (2, "error: --calibration is text for --activations; give both or neither\n")
    config = transformers.ViTConfig.from_dict(json.loads(Path(CONFIGS["vit"]).read_text()))
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    shown = cli("inspect", tmp_path / "vit", "--activations")
    assert shown.code == 2
    assert "--activations needs a model that can be exported and takes only token ids" in shown.err
