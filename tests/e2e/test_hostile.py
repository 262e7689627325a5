"""Input that somebody made to break things: one sentence each, no hang, no code run, nothing written elsewhere."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from helpers.mutations import DTYPES, cut_up, grafted, taken, with_header
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from quantize.artifact.load import read_manifest
from quantize.artifact.writer import as_json
from quantize.calibration.data import read_samples
from quantize.calibration.tensor_samples import read_tensors
from quantize.checkpoint.model_config import read_config
from quantize.checkpoint.opening import open_checkpoint, side_files
from quantize.checkpoint.paths import INDEX
from quantize.checkpoint.tensor_files import index_tensors, read_tensor
from quantize.checkpoint.tokenizer import Tokenize, load_tokenize
from quantize.checkpoint.untrusted_files import check_files, parse_json, weight_files
from quantize.checkpoint.weight_checks import check_weights
from quantize.errors import QuantizeError, UsageError
from quantize.graph.inputs import Input
from quantize.recipe.patterns import require_match
from quantize.recipe.recipe import load_recipe

RECIPE = """
scheme = "W4A4"
ignore = ["lm_head", "re:.*down_proj"]
nsamples = 3
passes = [{ name = "fold_norms" }, { name = "rotate", online_hadamard = false }]
quantizer = { name = "gptaq", damp = 0.02 }
tune = { steps = 200, learning_rate = 0.01 }
prefix = { tokens = [1, 2] }
[weights]
group_size = 64
symmetric = false
[activations]
clip_ratio = 0.9
[kv_cache]
num_bits = 4
"""
TENSORS = {"a.weight": torch.ones(4, 6), "a.bias": torch.zeros(4), "b": torch.arange(6, dtype=torch.int8)}
PIXELS = {"x": Input(torch.zeros(2, 3, device="meta"), (0,))}


def read_weights(path):
    for name, file in index_tensors(path.parent).items():
        read_tensor(file, name)


def read_rows(path):
    read_samples(path, 4, 8, Tokenize(lambda text: [ord(letter) % 7 for letter in text]), 512)


def sound_files(artifact, stories_calibration):
    """Name → the sound file and what reads it."""
    header = json.dumps({"files": {"a": "0" * 64}, "parity": {}, "quantization": artifact.manifest["quantization"]})
    config = (artifact.directory / "config.json").read_bytes()
    index = as_json({"metadata": {}, "weight_map": dict.fromkeys(TENSORS, "model.safetensors")})
    rows = (
        b'{"text": "abcdefgh"}\n{"input_ids": [1, 2, 3, 4, 5]}\n\n' + stories_calibration.read_bytes()[:200] + b"]}\n"
    )
    return {
        "recipe.toml": (RECIPE.encode(), lambda path: load_recipe("W4A4", path)),
        "model.safetensors": (save(TENSORS), read_weights),
        "manifest.json": (header.encode(), lambda path: read_manifest(path.parent)),
        "config.json": (config, lambda path: read_config(path.parent)),
        INDEX: (index.encode(), lambda path: weight_files(path.parent)),
        "rows.jsonl": (rows, read_rows),
        "x.safetensors": (save({"x": torch.ones(5, 3)}), lambda path: read_tensors(path, PIXELS, 4, None, 512)),
    }


BULK = {
    "recipe.toml": 2500, "model.safetensors": 2500, "manifest.json": 1500, "config.json": 1500, INDEX: 1500,
    "rows.jsonl": 1500, "x.safetensors": 1000,
}  # fmt: skip


@pytest.mark.parametrize("name", BULK)
def test_thousands_of_broken_files_end_in_a_sentence(name, artifact_rtn, stories_calibration, tmp_path, tree):
    """12,000 in all, of which some stay sound."""
    content, read = sound_files(artifact_rtn, stories_calibration)[name]
    rng, directory = random.Random(name), tmp_path / "in" / "deep"
    directory.mkdir(parents=True)
    if name == INDEX:
        save_file(TENSORS, directory / "model.safetensors")
    path = directory / name
    path.write_bytes(content)
    read(path)
    others = tree(tmp_path)
    counts = {True: 0, False: 0}
    for _ in range(BULK[name]):
        path.write_bytes(cut_up(content, rng))
        counts[taken(lambda: read(path), seconds=5)] += 1
    path.write_bytes(content)
    assert tree(tmp_path) == others
    assert counts[False] > BULK[name] / 4, counts  # the mutations do break it


def test_headers_of_every_type_and_shape(tmp_path):
    path, rng = tmp_path / "model.safetensors", random.Random(1)
    sizes = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "F16": 2, "BF16": 2}
    for dtype in DTYPES:
        for shape in ([3, 4], [0, 4], [], [12], [2**62, 4], [1] * 70):
            count = torch.Size(shape).numel() if max(shape, default=0) < 100 else 12
            size = count * sizes.get(dtype, 1)
            header = {"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
            path.write_bytes(with_header(header, bytes(size)))
            taken(lambda: read_weights(path))
            taken(lambda: read_tensors(path, {"w": Input(torch.zeros(3, 4), (0,))}, 4, None, 512))
            path.write_bytes(with_header(grafted(header, rng), bytes(size)))
            taken(lambda: read_weights(path))


@pytest.mark.parametrize("length", [0, 7, 2**32, 2**63, 2**64 - 1])
def test_a_header_that_declares_a_huge_length(length, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}" + bytes(64))
    with pytest.raises(QuantizeError, match="is truncated or no safetensors file"):
        index_tensors(tmp_path)


def test_keys_that_stand_twice(tmp_path, one_layer):
    entry = '"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_header(f"{{{entry}, {entry.replace('F32', 'I32')}}}".encode(), bytes(4)))
    with pytest.raises(QuantizeError, match="the key 'w' stands twice"):
        index_tensors(tmp_path)
    path.write_bytes(with_header(f"{{{entry}}}".encode(), bytes(4)))
    shutil.copy(path, tmp_path / "other.safetensors")
    with pytest.raises(QuantizeError, match=r"w stands both in .* and in other.safetensors; remove one of them"):
        index_tensors(tmp_path)
    shutil.copytree(one_layer, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace("{", '{"vocab_size": 7,', 1))
    with pytest.raises(QuantizeError, match=r"config.json is no JSON: the key 'vocab_size' stands twice"):
        open_checkpoint(tmp_path / "model")
    (tmp_path / "recipe.toml").write_text("seed = 1\nseed = 2\n")
    with pytest.raises(UsageError, match=r"recipe.toml is no TOML: "):
        load_recipe("W4A4", tmp_path / "recipe.toml")
    (tmp_path / "rows.jsonl").write_text('{"text": "abc", "text": "def"}')
    with pytest.raises(UsageError, match="line 1 is no JSON object"):
        read_rows(tmp_path / "rows.jsonl")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@given(json_values)
@settings(max_examples=50, deadline=None)
def test_sound_json_is_read_as_it_is(value):
    assert parse_json(json.dumps(value)) == value


@given(st.dictionaries(st.text(), json_values, max_size=6))
@settings(max_examples=50, deadline=None)
def test_any_table_is_a_recipe_or_refused(table):
    taken(lambda: load_recipe("W4A4", table))


def test_tables_with_hostile_values():
    rng, recipe = random.Random(2), load_recipe("W4A4", None).model_dump()
    assert sum(taken(lambda: load_recipe(None, grafted(recipe, rng))) for _ in range(300)) < 200


@pytest.mark.parametrize("pattern", ["re:(", "re:" + "(" * 5000, "re:a{99999999999}", "re:(?P<x", "re:[", "re:\\"])
def test_patterns_that_are_none(pattern):
    with pytest.raises(UsageError, match="ignore: "):
        require_match("ignore", pattern, ["model.layers.0.mlp.up_proj"])


def test_a_recipe_by_name_is_one_of_the_package(tmp_path):
    (tmp_path / "mine.toml").write_text("seed = 1")
    with pytest.raises(UsageError, match="no such recipe"):
        load_recipe("W4A4", tmp_path / "mine")
    with pytest.raises(UsageError, match="no such recipe"):
        load_recipe("W4A4", tmp_path / "no" / "recipe.toml")


def test_configs_with_hostile_values(variant):
    """Sizes beyond all files, layers without end, types of all kinds: refused before a model is built."""
    model, rng = variant(), random.Random(3)
    sound = json.loads((model / "config.json").read_text())
    for _ in range(150):
        (model / "config.json").write_text(json.dumps(grafted(sound, rng)))
        taken(lambda: open_and_check(model))


def open_and_check(model):
    checkpoint = open_checkpoint(model)
    check_weights(checkpoint, {name: p.shape for name, p in checkpoint.skeleton().named_parameters()})


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**8},
        {"intermediate_size": 10**9},
        {"hidden_size": 10**6, "head_dim": 10**6},
        {"num_attention_heads": 10**7, "num_key_value_heads": 10**7},
    ],
)
def test_a_model_larger_than_its_files_is_not_built(config, variant):
    model, started = variant(**config), time.monotonic()
    with pytest.raises(UsageError, match="the config does not build a LlamaForCausalLM: "):
        open_checkpoint(model)
    assert time.monotonic() - started < 5


def test_indices_that_lead_elsewhere(variant):
    model = variant()
    weights = load_file(model / "model.safetensors")
    shutil.copy(model / "model.safetensors", model.parent / "outside.safetensors")
    for name in ("../outside.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin", 5, "", ".", "a\x00b"):
        (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(weights, name)}))
        with pytest.raises(QuantizeError, match=r"only .safetensors files of the same directory are read"):
            open_checkpoint(model)
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(weights, "gone.safetensors")}))
    with pytest.raises(QuantizeError, match=r"holds no 'gone.safetensors', which model.safetensors.index.json names"):
        open_checkpoint(model)
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(weights, "model.safetensors")}))
    shutil.copy(model / "model.safetensors", model / "beside.safetensors")  # not named, so not read
    assert set(open_checkpoint(model).files.values()) == {model / "model.safetensors"}


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "generation_config.json", "secret.txt"])
def test_links_out_of_an_artifact(name, variant, tmp_path):
    model, outside = variant(), tmp_path / "outside"
    outside.write_text("a secret of somebody else")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(outside)
    with pytest.raises(UsageError, match=rf"{name} is a link out of the directory, to {outside}; put the file itself"):
        check_files(model)
    (model / name).unlink()
    (model / name).symlink_to("nowhere")
    with pytest.raises(UsageError, match=f"{name} is no regular file"):
        open_checkpoint(model)


def test_links_within_the_directory_and_the_hub_cache_are_followed(one_layer, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    shutil.copytree(one_layer, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    open_and_check(snapshot)
    (blobs / "alias.json").symlink_to("config.json")
    open_and_check(blobs)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer_config.json", INDEX])
def test_a_pipe_does_not_hang(name, variant):
    model = variant()
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    with pytest.raises(UsageError, match=r"is no regular file|holds no config.json"):
        open_checkpoint(model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "model.ckpt", "model.h5"])
def test_weights_that_can_hold_code_are_named_and_not_opened(name, variant):
    model = variant()
    (model / "model.safetensors").rename(model / name)
    with pytest.raises(
        UsageError, match=rf"no .safetensors weights but {name}, which can hold code and is never opened"
    ):
        open_checkpoint(model)


def test_tokenizers_with_hostile_values(variant):
    model, rng = variant(), random.Random(4)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = (model / name).read_bytes() if (model / name).exists() else b"{}"
        for number in range(60):
            broken = json.dumps(grafted(json.loads(content), rng)).encode() if number % 2 else cut_up(content, rng)
            (model / name).write_bytes(broken)
            taken(lambda: load_tokenize(model)("Once upon a time \x00 \U0001f600"))
        (model / name).write_bytes(content)
    assert load_tokenize(model)("Once upon a time")


def test_side_files_come_from_the_directory_alone(variant):
    model = variant()
    (model / ".hidden").mkdir()
    (model / ".hidden" / "x.json").write_text("{}")
    (model / "sub").symlink_to("/etc")
    assert not [path for path in side_files(model) if path.parts[0] in (".hidden", "sub")]


@pytest.mark.parametrize("pattern", [r"re:(([a-z0-9_.])+)+\$", "re:(a|a)*(.*.*.*)*b", "re:" + "(" * 5000 + ")" * 5000])
def test_a_pattern_that_backtracks_ends_at_once(pattern):
    started = time.monotonic()
    with pytest.raises(UsageError, match="ignore: 're:"):
        require_match("ignore", pattern, [f"model.layers.{i}.self_attn.q_proj.with.a.long.name" for i in range(100)])
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (".".join("a" * 20000) + " = 1", "it is nested 19999 deep; a recipe takes 16 at most"),
        ("[" + ".".join("a" * 20000) + "]", "it is nested 20000 deep"),
        ("a = " + "[" * 20000 + "]" * 20000, "it is nested 20000 deep"),
        ("a = [\n" * 20000, "it is nested 20000 deep"),
        ("a = " + "{b = " * 200, "it is nested 200 deep"),
        ("# " + "x" * 10_000_000, "it has more than 262144 bytes"),
        ('"""' * 80_000, "is no TOML"),
    ],
)
def test_recipes_are_bounded_before_they_are_parsed(text, words, tmp_path):
    (tmp_path / "recipe.toml").write_text(text)
    started = time.monotonic()
    with pytest.raises(UsageError, match=words):
        load_recipe("W4A4", tmp_path / "recipe.toml")
    assert time.monotonic() - started < 2


def test_what_looks_deep_in_strings_and_comments_is_not(tmp_path):
    names = "ignore = [" + ", ".join(f"\"model.layers.{i}.mlp.up_proj\", 'a.b.c.[[[[['" for i in range(100)) + "]"
    (tmp_path / "recipe.toml").write_text(f"{names}\n# {'[' * 100}\nseed = 3\n")
    assert len(load_recipe("W4A4", tmp_path / "recipe.toml").ignore) == 200


def test_a_recipe_that_never_ends_is_no_recipe():
    with pytest.raises(UsageError, match="no such recipe: /dev/zero"):
        load_recipe("W4A4", Path("/dev/zero"))


def test_a_message_does_not_repeat_a_whole_config_or_a_name_without_end(variant, cli):
    long = cli("inspect", variant("a", rope_parameters=[1] * 100_000))
    assert long.code == 2
    assert "the config does not build a LlamaForCausalLM: " in long.err
    assert len(long.err) < 1500
    model = variant("b")
    (model / "config.json").write_text((model / "config.json").read_text().replace("LlamaForCausalLM", "y" * 10**6))
    assert len(cli("inspect", model).err) < 5000


def test_a_tensor_with_a_name_without_end(variant):
    """A name of 5 MB took minutes to be compared with others."""
    model, started = variant(), time.monotonic()
    save_file(load_file(model / "model.safetensors") | {"x" * 10**6: torch.ones(2)}, model / "model.safetensors")
    with pytest.raises(QuantizeError, match="a tensor has a name of 1000000 characters"):
        open_checkpoint(model)
    assert time.monotonic() - started < 5


def test_a_tensor_whose_name_a_terminal_would_obey(variant):
    model = variant()
    save_file(load_file(model / "model.safetensors") | {"x\x1b[2J": torch.ones(2)}, model / "model.safetensors")
    with pytest.raises(QuantizeError, match=r"a tensor is called 'x\\x1b\[2J', which a terminal would obey"):
        open_checkpoint(model)
