"""Recipes: defaults, what changes them, what is wrong with them, and that a resolved one gives the same artifact."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from quantize.errors import UsageError
from quantize.pipeline.plan import make_plan
from quantize.recipe.merging import merge
from quantize.recipe.patterns import matches
from quantize.recipe.recipe import Recipe, load_recipe
from quantize.recipe.shipped import names, shipped
from quantize.scheme.scheme import SCHEME_NAMES

BITS = {
    "W8A8": (8, 8), "W8A16": (8, 16), "W4A16": (4, 16), "W3A16": (3, 16), "W4A8": (4, 8), "W4A4": (4, 4),
    "W6A6": (6, 6), "MXFP4": (4, 4), "NVFP4": (4, 4),
}  # fmt: skip
GROUPS = {"W8A8": 0, "W8A16": 0, "W6A6": 0, "MXFP4": 32, "NVFP4": 16}
TABLES = '[weights]\nnum_bits = 4\n[activations]\nnum_bits = 8\nclip_ratio = 0.9\n[quantizer]\nname = "rtn"\n'


def toml(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_a_scheme_alone_gives_the_promised_defaults(scheme):
    recipe = load_recipe(scheme, None)
    activations = 16 if recipe.activations is None else recipe.activations.num_bits
    assert (recipe.weights.num_bits, activations) == BITS[scheme]
    assert (recipe.nsamples, recipe.seqlen, recipe.seed) == (32, 512, 0)
    assert recipe.weights.group_size == GROUPS.get(scheme, 128)
    formats = {args.format for args in (recipe.weights, recipe.activations) if args}
    assert formats == {scheme.lower() if "FP4" in scheme else "int"}
    assert Recipe(**tomllib.loads(recipe.to_toml())) == recipe


def test_a_recipe_changes_tables_key_by_key_and_lists_as_a_whole(tmp_path):
    default = load_recipe("W4A8", None)
    recipe = load_recipe("W4A8", toml(tmp_path, 'nsamples = 3\npasses = [{ name = "rotate" }]\n' + TABLES))
    assert recipe.passes == ({"name": "rotate"},)
    assert recipe.quantizer == {"name": "rtn"}
    assert recipe.activations.clip_ratio == 0.9
    assert recipe.activations.symmetric == default.activations.symmetric
    assert recipe.weights == default.weights
    assert recipe.nsamples == 3


def test_options_change_the_recipe_and_no_option_leaves_it():
    given = {"scheme": "W4A16", "seed": 5, "nsamples": 7, "weights": {"group_size": 32, "symmetric": True}}
    assert load_recipe(None, given) == load_recipe("W4A16", given, seed=None, nsamples=None, group_size=None)
    recipe = load_recipe(None, given, seed=0, nsamples=9, seqlen=11, group_size=0)
    assert (recipe.seed, recipe.nsamples, recipe.seqlen) == (0, 9, 11)
    assert recipe.weights.group_size == 0
    assert recipe.weights.symmetric


def test_a_table_that_names_its_method_replaces_the_default_method():
    base = {"quantizer": {"name": "gptq", "damp": 0.1}, "weights": {"num_bits": 4, "group_size": 8}}
    changes = {"quantizer": {"name": "rtn"}, "weights": {"group_size": 2}}
    assert merge(base, changes) == {"quantizer": {"name": "rtn"}, "weights": {"num_bits": 4, "group_size": 2}}
    assert merge(base, {"quantizer": {"damp": 0.2}})["quantizer"] == {"name": "gptq", "damp": 0.2}
    assert base["quantizer"]["damp"] == 0.1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trust_remote_code = true", "trust_remote_code: there is no such key here; leave it out"),
        ("[weights]\ntrust_remote_code = true", r"weights\.trust_remote_code: there is no such key"),
        ("[weights]\nnum_bit = 4", r"weights\.num_bit: there is no such key here; did you mean `num_bits`\?"),
        ("[weights]\nnum_bits = 5", r"weights\.num_bits: input should be 3, 4, 6 or 8"),
        ("[weights]\nnum_bits = 4", "W8A8 stands for 8-bit weights and 8-bit activations, the tables say 4 and 8"),
        ("[weights]\ngroup_size = -1", r"weights\.group_size: .* greater than or equal to 0"),
        ("[activations]\nclip_ratio = 0", r"activations\.clip_ratio: .* greater than 0"),
        ("[activations]\nclip_ratio = 1.5", r"activations\.clip_ratio: .* less than or equal to 1"),
        ("weights = 4", "weights: input should be a valid dictionary"),
        ("nsamples = 0", "nsamples: .* greater than or equal to 1"),
        ("seqlen = 1", "seqlen: .* greater than or equal to 2"),
        ("seed = -1", "seed: .* greater than or equal to 0"),
        ("seed = 0.5", "seed: input should be a valid integer"),
        ('ignore = "lm_head"', "ignore: input should be a valid tuple"),
        ('passes = ["rotate"]', r"passes\.0: input should be a valid dictionary"),
        ('quantizer = "rtn"', "quantizer: input should be a valid dictionary"),
        ("a =", "is no TOML"),
    ],
)
def test_a_wrong_recipe_is_refused_by_its_key(tmp_path, text, words):
    with pytest.raises(UsageError, match=words) as raised:
        load_recipe("W8A8", toml(tmp_path, text))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"passes": [{"name": "rotat"}]},
            "there is no pass 'rotat'; known are activation_clip, adaptive_rotation, ",
        ),
        ({"passes": [{}]}, "there is no pass 'None'"),
        ({"passes": [{"name": "rotate", "angle": 1}]}, "pass 'rotate': angle: there is no such key here; leave it out"),
        ({"passes": [{"name": "smoothquant", "alpha": 2}]}, "pass 'smoothquant': alpha: .* less than or equal to 1"),
        ({"quantizer": {"name": "awq"}}, "there is no quantizer 'awq'; known are gptaq, gptq, rtn"),
        ({"quantizer": {"name": "gptq", "damp": -1}}, "quantizer: damp: .* greater than 0"),
        ({"ignore": ["q_prj"]}, "ignore: 'q_prj' matches no linear; near are q_proj"),
        ({"ignore": ["lm_head", "lm_heads"]}, "ignore: 'lm_heads' matches no linear; near are lm_head"),
        ({"targets": ["model.layers.9.mlp.up_proj"]}, r"targets: .* near are model\.layers\.0\.mlp\.up_proj"),
        ({"targets": ["re:.*_projection"]}, r"targets: 're:\.\*_projection' matches no linear; near are "),
        ({"targets": ["re:("]}, r"targets: 're:\(' is no regular expression of RE2.*: missing \)"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(program, changes, words):
    with pytest.raises(UsageError, match=words):
        make_plan(load_recipe("W8A8", changes), program)


def test_a_missing_recipe_and_a_missing_scheme(tmp_path):
    with pytest.raises(UsageError, match=r"no such recipe: .*absent\.toml"):
        load_recipe("W8A8", tmp_path / "absent.toml")
    with pytest.raises(UsageError, match=r"scheme.* W8A8, W8A16, W4A16, W3A16, W4A8, W4A4"):
        load_recipe(None, {"nsamples": 3})
    with pytest.raises(
        UsageError, match="unknown scheme 'W3A3'; known are W8A8, W8A16, W4A16, W3A16, W4A8, W4A4, W6A6, MXFP4, NVFP4"
    ):
        load_recipe("W3A3", None)


def test_patterns_are_names_ends_of_names_or_whole_expressions():
    path = "model.layers.0.mlp.up_proj"
    assert all(matches(pattern, path) for pattern in (path, "up_proj", "mlp.up_proj", "re:.*up.*"))
    assert not any(matches(pattern, path) for pattern in ("p_proj", "model", "layers.0", "re:up_proj", "re:model", ""))


def test_the_output_head_is_left_alone_by_default_and_ignore_adds_to_that(program):
    def ignored(changes=None, **options):
        plan = make_plan(load_recipe("W8A8", changes, **options), program)
        return {name: why for name, why in plan.skipped.items() if "linear" not in why}

    head = {"lm_head.weight": "ignored by 'lm_head'"}
    query = {"model.layers.0.self_attn.q_proj.weight": "ignored by 'q_proj'"}
    assert ignored() == head
    assert ignored(ignore=("q_proj",)) == head | query
    assert ignored({"ignore_also": ["q_proj"]}) == head | query
    assert ignored({"ignore": ["q_proj"]}) == query
    assert ignored({"ignore": []}) == {}
    up = make_plan(load_recipe("W8A8", {"targets": ["up_proj"]}), program)
    assert list(up.schemes) == ["model.layers.0.mlp.up_proj"]
    assert up.skipped["model.layers.0.mlp.down_proj.weight"] == "not in targets"


@pytest.mark.slow
def test_a_resolved_recipe_gives_the_same_artifact(one_layer, small_run, tree, tmp_path):
    changes = {"passes": [{"name": "smoothquant", "alpha": 0.3}, {"name": "rotate", "residual": False}]}
    first = small_run(one_layer, "W4A8", recipe=changes, ignore=["re:.*k_proj"], seed=3)
    defaults = {"group_size": None, "nsamples": None, "seqlen": None}
    again = small_run(one_layer, None, "again", recipe=str(first.directory / "recipe.toml"), **defaults)
    assert tree(first) == tree(again)
    written = tomllib.loads((tmp_path / "out" / "recipe.toml").read_text())
    assert written["ignore"] == ["lm_head", "re:.*k_proj"]
    assert written["passes"][0] == {"name": "smoothquant", "alpha": 0.3}
    assert {"rotate", "gptaq"} == {written["passes"][1]["name"], written["quantizer"]["name"]}
    assert (written["seed"], written["nsamples"], written["weights"]["group_size"]) == (3, 2, 0)


@pytest.mark.parametrize("changes", [{"targets": []}, {"ignore": ["re:.*"]}])
def test_a_recipe_that_leaves_nothing_to_quantize_is_refused(program, changes):
    with pytest.raises(UsageError, match="no linear is left to quantize; the largest parameters are"):
        make_plan(load_recipe("W8A8", changes), program)


def test_a_scheme_must_come_from_somewhere():
    with pytest.raises(
        UsageError, match=r"give --scheme, one of W8A8, .*, W4A4, W6A6, MXFP4, NVFP4, or a recipe with one"
    ):
        load_recipe(None, {"seed": 1})


@pytest.mark.parametrize("name", names())
def test_every_recipe_of_the_package_fits_and_says_where_it_comes_from(name, program):
    text = shipped(name)
    assert text.startswith("# ") and " 20" in text.partition("scheme =")[0]
    groups = {"mxfp4": 32, "nvfp4": 16}.get(name.split("-")[0], 0)
    ignore = ("down_proj",) if groups else ()  # whose 172 columns no group divides
    plan = make_plan(load_recipe(None, Path(name), group_size=groups, ignore=ignore), program)
    assert plan.recipe.scheme.lower() == name.split("-")[0]
    assert plan.schemes


def test_an_unknown_recipe_is_answered_with_those_there_are():
    with pytest.raises(
        UsageError,
        match=r"no such recipe: w4a5; give a \.toml or \.yaml file, or one of mxfp4, mxf",
    ):
        load_recipe(None, Path("w4a5"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"group_size": 64}, r"recipe: group_size: there is no such key here; did you mean `\[weights\] group_size`"),
        (
            {"weights": {"seqlen": 9}},
            "recipe: weights.seqlen: there is no such key here; did you mean `seqlen in no table`",
        ),
        ({"quantiser": {"name": "rtn"}}, "recipe: quantiser: there is no such key here; did you mean `quantizer`"),
        ({"clip_ratio": 1.0}, r"did you mean `\[activations\] clip_ratio` or `\[kv_cache\] clip_ratio`"),
    ],
)
def test_a_key_in_the_wrong_place_says_where_it_belongs(changes, words):
    with pytest.raises(UsageError, match=words):
        load_recipe("W4A8", changes)
