"""Models from a hub: a server here speaks its few calls, also when it breaks off, refuses, or sends something else."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from helpers.hub import COMMIT, running_hub

from quantize.checkpoint.opening import open_checkpoint
from quantize.errors import QuantizeError, UsageError


@pytest.fixture
def hub(one_layer, tmp_path, monkeypatch):
    """Return a hub that runs here, with an empty cache beside it."""
    with running_hub(one_layer, tmp_path / "cache", monkeypatch) as server:
        yield server


def test_a_model_is_fetched_once_and_goes_on_where_it_broke_off(hub, one_layer):
    hub.breaks = 1
    found, name = open_checkpoint("org/model"), "model.norm.weight"
    assert torch.equal(found.tensor(name), open_checkpoint(one_layer).tensor(name))
    asked = Counter(hub.asked)
    assert open_checkpoint("org/model@v1").directory.name == COMMIT
    weights = "/org/model/resolve/" + COMMIT + "/model.safetensors"
    assert hub.asked[weights] == asked[weights] == 2


def test_weights_that_are_not_what_the_hub_says(hub):
    hub.wrong = True
    with pytest.raises(QuantizeError, match=r"model.safetensors has not the SHA-256 that the hub gives for it; remove"):
        open_checkpoint("org/model")


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (429, "the hub takes no more requests from you for now"),
        (500, "the hub answers with the error 500; start again later"),
        (403, "the hub answers with the error 403"),
    ],
)
def test_a_hub_that_refuses(hub, status, words):
    hub.status = status
    with pytest.raises(UsageError, match=words):
        open_checkpoint("org/model")


@pytest.mark.usefixtures("hub")
def test_what_the_hub_does_not_have():
    with pytest.raises(UsageError, match="the hub has no model of that id for you; if it is private, log in"):
        open_checkpoint("org/other")
    with pytest.raises(UsageError, match="org/model has no revision v2 on the hub; give a branch, a tag or a commit"):
        open_checkpoint("org/model@v2")


def test_no_network(hub):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(UsageError, match="the hub cannot be reached to fetch it; give a model's directory"):
        open_checkpoint("org/model")
