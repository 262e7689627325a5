"""What is told of modules' names without torch is never less than what there may be."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModel

from quantize.checkpoint.module_names import kinds, possible_parts, text_of
from quantize.errors import UsageError
from quantize.recipe.patterns import require_possible


@pytest.mark.parametrize("kind", ["mixtral", "gemma3", "qwen3_moe", "gpt2", "whisper", "gpt_oss"])
def test_the_text_of_a_class_has_the_names_of_its_modules(kind):
    """Stacks of experts, towers and parts with a type of their own, whatever files call them."""
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(kind))
    text = " ".join(map(text_of, kinds(model.config.to_dict())))
    for part in {part for name, _ in model.named_parameters() for part in name.split(".")[:-1]}:
        assert part in text or part.isdigit()


def config_with(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoModel": "code.Model"}},
        {"model_type": "nobodys"},
        {"model_type": "../llama"},
        {"vision_config": {"model_type": "nobodys"}},
        {"model_type": None},
    ],
)
def test_where_a_class_is_not_known_nothing_is_told(changes, one_layer, tmp_path):
    shutil.copytree(one_layer, tmp_path / "model")
    parts, words = possible_parts(tmp_path / "model")
    assert "q_proj" in parts
    assert "gate_proj" in words
    config_with(tmp_path / "model", **changes)
    assert possible_parts(tmp_path / "model") == (set(), set())


@pytest.mark.parametrize("pattern", ["lm_head", "layers.99", "*.experts*.up", "experts_3.up", "re:.*none", "embed"])
def test_a_pattern_that_may_match_is_left_to_the_run(pattern):
    require_possible("ignore", pattern, {"layers", "0", "up", "embed"}, {"lm_head", "experts_"})


@pytest.mark.parametrize("pattern", ["lm_hed", "layers.0.upp", "*.layer.*.up", "uppp.*"])
def test_a_pattern_that_cannot_match_is_refused(pattern):
    with pytest.raises(UsageError, match="matches no linear; near are"):
        require_possible("ignore", pattern, {"layers", "0", "up", "embed"}, {"lm_head", "experts_"})
    require_possible("ignore", pattern, set(), set())
