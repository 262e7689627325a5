"""What a target decides: the recipe, what is refused by name, and that its exporter takes the result."""

from __future__ import annotations

import pytest

from quantize.errors import UsageError
from quantize.export import EXPORTERS
from quantize.export.outline import Outline
from quantize.recipe.patterns import expand_patterns
from quantize.recipe.recipe import load_recipe
from quantize.recipe.targets import TARGETS
from quantize.scheme.scheme import SCHEME_NAMES


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_has_a_recipe_for_each_scheme_or_refuses_it_by_name(target):
    for scheme in SCHEME_NAMES:
        if scheme in TARGETS[target].refused:
            with pytest.raises(UsageError, match=f"{target} cannot execute {scheme}: .*; give W"):
                load_recipe(scheme, None, target=target)
        else:
            assert load_recipe(scheme, None, target=target).scheme == scheme
    with pytest.raises(UsageError, match=r"there is no target 'sglang'; known are onnxruntime"):
        load_recipe("W4A8", None, target="sglang")


def test_a_recipe_of_ones_own_changes_the_targets_recipe():
    found = load_recipe("W4A4", {"quantizer": {"name": "rtn"}}, target="vllm")
    assert found.quantizer == {"name": "rtn"}
    assert (found.weights.symmetric, found.activations.clip_ratio) == (True, 1.0)


@pytest.mark.parametrize(("target", "scheme"), [("vllm", "W4A4"), ("transformers", "W4A8"), ("onnxruntime", "W4A4")])
def test_the_exporter_takes_what_the_target_made(target, scheme, small_run, one_layer):
    artifact = small_run(one_layer, scheme, target=target, recipe={"quantizer": {"name": "rtn"}}, group_size=4)
    EXPORTERS[TARGETS[target].format].check(Outline.read(artifact.directory))


def test_what_a_recipe_adds_is_refused_before_the_run(small_run, one_layer, tmp_path):
    with pytest.raises(UsageError, match=r"vllm cannot execute the result: .* clipped activations; quantize with"):
        small_run(one_layer, "W4A8", target="vllm", recipe={"activations": {"clip_ratio": 0.9}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "scheme"), [("w4a8", "W4A8"), ("int4", "W4A16"), ("NvFp4", "NVFP4")])
def test_schemes_in_any_case_and_by_common_names(name, scheme):
    assert load_recipe(name, None).scheme == scheme


def test_globs_and_lists_of_names():
    found = list(expand_patterns(["lm_head, *.down_proj", "re:a{1,2}", "layers.?.mlp"]))
    assert found == ["lm_head", r"re:(.*\.)?.*\.down_proj", "re:a{1,2}", r"re:(.*\.)?layers\..\.mlp"]


def test_a_recipe_in_yaml_is_the_same(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("passes: [{name: rotate, residual: false}]\nweights:\n  group_size: 32\n")
    found = load_recipe("W4A8", path)
    assert (found.weights.group_size, found.passes) == (32, ({"name": "rotate", "residual": False},))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &x [1]\nb: *x", "is no YAML: it has an alias"),
        ("[" * 40 + "]" * 40, "is no YAML: it is nested too deeply"),
        ("a: [", "is no YAML: while parsing"),
        ("- 1", "is no YAML: it holds no keys with values"),
        ("a: !!python/object/apply:os.system [ls]", "is no YAML: could not determine a constructor"),
        ("x" * 70000, "more than a recipe ever has"),
    ],
)
def test_yaml_that_is_no_recipe(tmp_path, text, words):
    path = tmp_path / "recipe.yml"
    path.write_text(text)
    with pytest.raises(UsageError, match=words):
        load_recipe("W4A8", path)
