"""Checkpoints under other names than the model's code has: prefixes, base models, heads, no architecture."""

import pytest
import torch
import transformers
from helpers.json_files import change_json
from safetensors.torch import load_file, save_file

from quantize.checkpoint.opening import open_checkpoint
from quantize.checkpoint.weight_checks import check_weights
from quantize.errors import QuantizeError, UsageError

BERT = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
GPT2 = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 32}
IDS = torch.tensor([[3, 7, 11, 2]])


def rename(directory, new):
    """Give the tensors of a model other names."""
    path = directory / "model.safetensors"
    save_file({new(name): tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    return directory


def saved(cls, config, directory, **changes):
    """Save a random model, and return it in evaluation mode."""
    torch.manual_seed(0)
    model = cls(config).eval()
    model.save_pretrained(directory)
    change_json(directory / "config.json", **changes)
    return model


def output(model):
    with torch.no_grad():
        return model(input_ids=IDS)[0]


@pytest.mark.parametrize(
    ("cls", "new"),
    [
        (transformers.GPT2LMHeadModel, lambda name: name.removeprefix("transformer.")),
        (transformers.BertModel, lambda name: f"bert.{name}"),
        (transformers.BertForMaskedLM, lambda name: f"module.{name}"),
        (transformers.GPT2LMHeadModel, lambda name: f"module._orig_mod.{name.removeprefix('transformer.')}"),
    ],
)
def test_names_of_base_models_and_wrappers(cls, new, tmp_path):
    config = transformers.GPT2Config(**GPT2) if cls is transformers.GPT2LMHeadModel else transformers.BertConfig(**BERT)
    model = saved(cls, config, tmp_path / "m")
    found = open_checkpoint(rename(tmp_path / "m", new))
    assert torch.equal(output(found.load()), output(model))
    assert any("taken as" in note for note in found.notes) is new("x").startswith("module.")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "_forward_module.student."])
def test_prefixes_that_all_names_share_are_dropped_and_named(prefix, variant, one_layer):
    found = open_checkpoint(rename(variant(), lambda name: prefix + name))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(found.tensor(name), open_checkpoint(one_layer).tensor(name))
    assert any(f"{prefix}model.embed_tokens.weight is taken as model.embed_tokens.weight" in x for x in found.notes)


def test_blocks_that_were_compiled_one_by_one(variant, one_layer):
    found = open_checkpoint(rename(variant(), lambda name: name.replace("layers.0.", "layers.0._orig_mod.")))
    assert torch.equal(output(found.load()), output(open_checkpoint(one_layer).load()))


def test_a_missing_tensor_is_named_with_the_nearest(variant):
    model = variant(num_hidden_layers=5)
    found = open_checkpoint(rename(model, lambda name: name.replace("0.mlp.up_proj", "0.mlp.up")))
    with pytest.raises(QuantizeError, match=r"no tensor .*0.mlp.up_proj.weight, .* holds is model.layers.0.mlp.up.wei"):
        check_weights(found, {name: p.shape for name, p in found.skeleton().named_parameters()})


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (transformers.GPT2LMHeadModel, transformers.GPT2Config(**GPT2)),
        (transformers.GPT2ForSequenceClassification, transformers.GPT2Config(**GPT2, num_labels=3)),
        (transformers.BertModel, transformers.BertConfig(**BERT)),
        (transformers.BertForMaskedLM, transformers.BertConfig(**BERT)),
        (transformers.BertForTokenClassification, transformers.BertConfig(**BERT)),
    ],
)
def test_the_architecture_follows_from_the_files(cls, config, tmp_path):
    saved(cls, config, tmp_path / "m", architectures=None)
    assert open_checkpoint(tmp_path / "m").config["architectures"] == [cls.__name__]


def test_an_unknown_type_without_architecture(variant):
    with pytest.raises(UsageError, match=r"names no architecture, and its model_type is 'x', .* add the key arch"):
        open_checkpoint(variant(architectures=[], model_type="x"))


def test_a_head_that_differs_from_the_table_it_is_tied_to_counts(variant):
    model = variant()
    tensors = load_file(model / "model.safetensors")
    head = torch.randn_like(tensors["model.embed_tokens.weight"])
    save_file(tensors | {"lm_head.weight": head}, model / "model.safetensors", metadata={"format": "pt"})
    found, peer = open_checkpoint(model), transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    assert torch.equal(output(found.load()), output(peer.float()))
    assert found.config["tie_word_embeddings"] is False
    assert any("ties lm_head.weight and model.embed_tokens.weight" in x or "and they differ" in x for x in found.notes)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, model / "model.safetensors")
    assert not any("differ" in note for note in open_checkpoint(model).notes)


def test_tensors_without_a_place_are_named(variant):
    model = variant(num_hidden_layers=5)
    tensors = load_file(model / "model.safetensors") | {"model.extra.weight": torch.ones(3)}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert open_checkpoint(model).notes == (
        "1 tensors of the files have no place in the model and are left out, such as model.extra.weight",
    )


def test_a_classifier_without_padding_token_takes_rows_together(tmp_path):
    config = transformers.GPT2Config(**GPT2, num_labels=3)
    model, rows = (
        saved(transformers.GPT2ForSequenceClassification, config, tmp_path / "m"),
        torch.tensor([[3, 7], [5, 1]]),
    )
    with torch.no_grad():
        each = torch.cat([model(input_ids=row[None]).logits for row in rows])
        torch.testing.assert_close(open_checkpoint(tmp_path / "m").load()(input_ids=rows).logits, each)
