"""Statistics of parts of the data, collected apart and merged, in place of one run over all of it."""

from __future__ import annotations

import json

import pytest

from quantize.errors import UsageError
from quantize.pipeline import statistics_files
from quantize.pipeline.quantize import collect_stats, quantize_model
from quantize.pipeline.statistics_files import merge_stats, read_collected
from quantize.recipe.recipe import load_recipe

pytestmark = pytest.mark.slow

RTN = {"quantizer": {"name": "rtn"}}
SMOOTHED = {"passes": [{"name": "smoothquant"}]} | RTN
SETTINGS = {"group_size": 0, "nsamples": 8, "seqlen": 32}


@pytest.fixture(scope="module")
def parts(stories_calibration, tmp_path_factory):
    """Rows of token ids: two halves and the whole."""
    folder, lines = tmp_path_factory.mktemp("parts"), stories_calibration.read_text().splitlines()[:8]
    for name, chosen in (("first", lines[:4]), ("second", lines[4:]), ("whole", lines)):
        (folder / f"{name}.jsonl").write_text("\n".join(chosen) + "\n")
    return folder


def collected(model, parts, name, output, changes=SMOOTHED):
    recipe = load_recipe("W4A8", changes, **SETTINGS)
    return collect_stats(model, output=output / name, recipe=recipe, calibration=parts / f"{name}.jsonl")


def tensors(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.glob("model-*.safetensors"))}


def test_merged_parts_quantize_as_the_whole(one_layer, parts, tmp_path):
    for name in ("first", "second", "whole"):
        collected(one_layer, parts, name, tmp_path)
    merged = merge_stats([tmp_path / "second", tmp_path / "first"], tmp_path / "merged")
    assert sorted(part["rows"] for part in merged.data.values()) == [4, 4]
    made = {}
    for name in ("first", "whole", "merged"):
        out, given = tmp_path / f"{name}-out", tmp_path / name
        made[name] = quantize_model(
            one_layer, output_dir=out, scheme="W4A8", recipe=SMOOTHED, stats=given, **SETTINGS,
            calibration=parts / "first.jsonl",
        )  # fmt: skip
    assert tensors(made["merged"].directory) == tensors(made["whole"].directory)
    assert tensors(made["first"].directory) != tensors(made["whole"].directory)
    record = made["merged"].manifest["calibration"]
    assert (record["rows"], len(record["sha256"])) == (8, 2)
    assert record["leading_tokens"] == [1]
    assert record["tokens"] == made["whole"].manifest["calibration"]["tokens"]


def test_a_file_that_is_interrupted_leaves_nothing(one_layer, parts, tmp_path, monkeypatch):
    collected(one_layer, parts, "first", tmp_path)
    whole = statistics_files.save_state

    def interrupted(*args):
        whole(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(statistics_files, "save_state", interrupted)
    (tmp_path / "new").mkdir()
    with pytest.raises(KeyboardInterrupt):
        merge_stats([tmp_path / "first"], tmp_path / "new" / "merged")
    assert not list((tmp_path / "new").iterdir())


def test_what_cannot_be_merged_is_refused(one_layer, parts, tmp_path):
    collected(one_layer, parts, "first", tmp_path)
    (tmp_path / "other").mkdir()
    collected(one_layer, parts, "second", tmp_path / "other", {"passes": [{"name": "smoothquant", "alpha": 0.7}]} | RTN)
    with pytest.raises(UsageError, match=r"the recipe \(passes\) of .*second differs from that of .*first; collect"):
        merge_stats([tmp_path / "first", tmp_path / "other" / "second"], tmp_path / "out")
    with pytest.raises(UsageError, match="is of data that was merged already; give each part of the data once"):
        merge_stats([tmp_path / "first", tmp_path / "first"], tmp_path / "out")
    with pytest.raises(UsageError, match=r"the recipe \(seed\) changed since .*first was collected; collect it anew"):
        quantize_model(
            one_layer, output_dir=tmp_path / "o", scheme="W4A8", recipe=SMOOTHED, stats=tmp_path / "first", seed=1,
            **SETTINGS,
        )  # fmt: skip
    (tmp_path / "noise").write_text("{}")
    with pytest.raises(UsageError, match=r"noise holds no statistics of --collect-stats"):
        read_collected(tmp_path / "noise")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "noise", "other"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"gptaq needs all data in one run; .* round with \{ name = \"rtn\" \} alone"),
        ({"passes": []} | RTN, "need exactly one pass that asks for them, and this recipe has none"),
        (
            {"passes": [{"name": "smoothquant"}, {"name": "activation_clip"}]} | RTN,
            "and this recipe has smoothquant, activation_clip",
        ),
        (SMOOTHED | {"tune": {}}, "tune needs all data in one run"),
    ],
)
def test_recipes_that_need_more_than_statistics_are_refused(one_layer, parts, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        collected(one_layer, parts, "first", tmp_path, changes)
    assert not list(tmp_path.iterdir())


def test_the_command_collects_and_merges(cli, one_layer, parts, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('passes = [{ name = "smoothquant" }]\nquantizer = { name = "rtn" }\n')
    common = ["--scheme", "W4A8", "--recipe", recipe, "--group-size", "0", "--seqlen", "32"]
    for name in ("first", "second"):
        done = cli(one_layer, *common, "--calibration", parts / f"{name}.jsonl", "--collect-stats", tmp_path / name)
        assert (done.code, done.out) == (0, f"{tmp_path / name}: statistics of 128 tokens\n")
    done = cli("merge-stats", tmp_path / "first", tmp_path / "second", "--output", tmp_path / "all")
    assert done.out == f"{tmp_path / 'all'}: statistics of 256 tokens in 2 parts\n"
    done = cli(one_layer, *common, "--stats", tmp_path / "all", "--output-dir", tmp_path / "out")
    assert done.code == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["calibration"]["tokens"] == 256
    again = cli("merge-stats", tmp_path / "first", "--output", tmp_path / "all")
    assert (again.code, again.err) == (2, f"error: {tmp_path / 'all'} exists already; give a new file\n")
