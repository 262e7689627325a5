"""A model in a local directory never goes to the network, whatever its config names."""

from __future__ import annotations

import importlib
import inspect
import json
import socket

import pytest
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.configuration_auto import model_type_to_module_name

from quantize.checkpoint.opening import open_checkpoint
from quantize.checkpoint.tokenizer import load_tokenize
from quantize.errors import QuantizeError, UsageError

NAMED = {"backbone": "microsoft/resnet-50", "use_timm_backbone": False, "use_pretrained_backbone": True}


def families():
    """Yield a model of each family, with the keys of its config that may lead to the hub."""
    for kind in CONFIG_MAPPING:
        folder = model_type_to_module_name(kind)
        try:
            config, model = (
                importlib.import_module(f"transformers.models.{folder}.{part}_{folder}")
                for part in ("configuration", "modeling")
            )
        except ImportError:  # of a library that is not here
            continue
        classes = [x for x in vars(model).values() if isinstance(x, type) and issubclass(x, PreTrainedModel)]
        own = [x.__name__ for x in classes if x.config_class is CONFIG_MAPPING[kind]]
        keys = NAMED if "backbone_config" in inspect.getsource(config) else {}
        yield from [(name, keys) for name in own if not name.endswith("PreTrainedModel")][:1]


@pytest.fixture
def attempts(monkeypatch):
    """Close all sockets, and list who tried to open one; the hub is not told to stay offline."""
    found = []

    def closed(*arguments, **_):
        found.append(arguments)
        raise OSError("the sockets are closed")

    monkeypatch.setattr(socket.socket, "connect", closed)
    monkeypatch.setattr(socket, "getaddrinfo", closed)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return found


@pytest.mark.slow
def test_no_family_goes_to_the_network(variant, attempts):
    """All but a few declare more than the files hold, and are refused once the config is read."""
    model, names, refused = variant(), list(families()), []
    for name, keys in names:
        (model / "config.json").write_text(json.dumps({"architectures": [name], **keys}))
        try:
            open_checkpoint(model)
        except QuantizeError as error:
            refused.append(str(error))
    assert not attempts
    assert len(names) > 200
    assert sum("names a part that lies on the hub" in words for words in refused) > 12


def test_a_backbone_by_name_is_refused_in_words(variant, attempts):
    model = variant()
    (model / "config.json").write_text(json.dumps({"architectures": ["UperNetForSemanticSegmentation"], **NAMED}))
    with pytest.raises(UsageError, match="`backbone`, and a local directory never goes to the network; save the model"):
        open_checkpoint(model)
    assert not attempts


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_code_from_the_hub_in_place_of_attention_is_not_asked_for(key, variant, attempts):
    model = open_checkpoint(variant(**{key: "kernels-community/flash-attn2"})).skeleton()
    assert "/" not in str(model.config._attn_implementation)
    assert not attempts


def test_a_tokenizer_is_read_without_the_network(variant, attempts):
    assert load_tokenize(variant())("Once upon a time")
    assert not attempts
    assert transformers.utils.hub.is_offline_mode() is False
