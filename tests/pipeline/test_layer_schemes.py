"""Linears with schemes of their own: what a recipe may say, what a run makes of it, and what every engine runs."""

import json

import numpy as np
import pytest
import torch

from quantize.artifact.load import load
from quantize.artifact.verify import verify_artifact
from quantize.errors import UsageError
from quantize.export.directory import export_artifact
from quantize.export.onnx.precision import CAST, INTEGERS
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.pipeline.layer_schemes import scheme_for
from quantize.pipeline.plan import make_plan
from quantize.recipe.fields import LayerArgs
from quantize.recipe.recipe import load_recipe

DOWN = "model.layers.0.mlp.down_proj"
RTN = {"passes": [], "quantizer": {"name": "rtn"}}
MIXED = {"layers": [{"match": "re:.*down_proj", "scheme": "W8A8"}]}


def labels(program, layers, scheme="W4A4", **settings):
    """Scheme and group size of each linear, by the end of its path."""
    plan = make_plan(load_recipe(scheme, {"layers": layers, **RTN}, **{"group_size": 0, **settings}), program)
    return {
        path.rpartition(".")[2]: (found.label, found.weights.group_size) for path, found in plan.schemes.items()
    }, plan


def test_the_last_entry_that_matches_counts(program):
    layers = [
        {"match": "re:.*_proj", "scheme": "W8A8"},
        {"match": "re:.*mlp.*", "group_size": 4},
        {"match": "up_proj", "ignore": True},
    ]
    found, plan = labels(program, layers)
    assert found["q_proj"] == ("W8A8", 0)
    assert found["down_proj"] == found["gate_proj"] == ("W4A4", 4)
    assert "up_proj" not in found
    assert plan.skipped["model.layers.0.mlp.up_proj.weight"] == "ignored by 'up_proj' of layers"
    assert plan.default_scheme.label == "W8A8"  # of most linears


def test_the_output_head_stays_unless_an_entry_gives_it_a_scheme(program):
    assert "lm_head" not in labels(program, [{"match": "re:.*", "group_size": 4}])[0]
    assert labels(program, [{"match": "lm_head", "scheme": "W8A8"}])[0]["lm_head"] == ("W8A8", 0)
    assert "lm_head" not in labels(program, [{"match": "lm_head", "ignore": True}])[0]


def test_a_default_group_size_gives_way_to_the_largest_that_divides():
    recipe = load_recipe("W4A4", None)
    sizes = {1152: 128, 576: 64, 96: 32, 100: 0}
    assert {columns: scheme_for(recipe, None, columns).weights.group_size for columns in sizes} == sizes
    entry = LayerArgs(match="a", scheme="W4A8")
    assert scheme_for(recipe, entry, 576).weights.group_size == 64
    asked = load_recipe("W4A4", {"weights": {"group_size": 128}})
    assert scheme_for(asked, None, 576).weights.group_size == 128  # which `check_groups` refuses


def test_a_run_says_which_groups_it_took(cli, stories, stories_calibration, tmp_path):
    shown = cli(stories, "--scheme", "W4A8", "--output-dir", tmp_path / "out", "--calibration", stories_calibration,
                "--nsamples", 2, "--seqlen", 16)  # fmt: skip
    assert shown.code == 0, shown.err
    line = "groups of 128 do not divide the 64 columns of"
    assert line in shown.err
    assert "which take groups of 64" in shown.err
    refused = cli(stories, "--scheme", "W4A8", "--output-dir", tmp_path / "b", "--group-size", 128)
    assert refused.code == 2
    assert "the group size 128 does not divide the 64 columns of model.layers.0.self_attn.q_proj" in refused.err


@pytest.mark.parametrize(
    ("layers", "settings"),
    [
        ([{"match": "lm_head", "scheme": "W8A8"}], {"ignore": ("lm_head",)}),
        ([{"match": "up_proj", "scheme": "W8A8"}, {"match": "re:.*", "group_size": 4}], {}),
    ],
)
def test_an_entry_that_decides_nothing_is_refused(program, layers, settings):
    with pytest.raises(UsageError, match=f"layers: the entry '{layers[0]['match']}' changes nothing, .*move it to"):
        labels(program, layers, **settings)


def test_a_scheme_is_that_of_its_default_recipe(program):
    """Also where the recipe has the same one with other tables: `--group-size` is the recipe's."""
    found, _ = labels(
        program,
        [{"match": "re:.*[qk]_proj", "scheme": "MXFP4"}, {"match": "up_proj", "scheme": "W8A8"}],
        "W8A8",
        group_size=4,
    )
    assert (found["v_proj"], found["q_proj"], found["up_proj"]) == (("W8A8", 4), ("MXFP4", 32), ("W8A8", 0))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"match": "nose"}, "layers.0: give either ignore = true, or scheme or group_size or both"),
        ({"match": "up_proj", "ignore": True, "scheme": "W8A8"}, "layers.0: give either ignore = true, or scheme"),
        ({"match": "nose", "scheme": "W8A8"}, "layers: 'nose' matches no linear; near are"),
        ({"match": "re:(", "scheme": "W8A8"}, r"layers: 're:\(' is no regular expression"),
        ({"match": "up_proj", "scheme": "W3A3"}, "layers.0.scheme: input should be 'W8A8', 'W8A16', 'W4A16'"),
        ({"match": "up_proj", "group_size": 7}, "the group size 7 does not divide .*its entry of layers"),
        ({"match": "up_proj", "scheme": "MXFP4", "group_size": 8}, "recipe: layers: 'up_proj': mxfp4 weights need"),
    ],
)  # fmt: skip
def test_what_an_entry_cannot_say(program, entry, message):
    with pytest.raises(UsageError, match=message):
        labels(program, [entry])


def test_passes_are_told_the_scheme_of_each_linear(program):
    """Runtime smooth needs one scale a row, which the entry takes away."""
    with pytest.raises(UsageError, match="sorts channels across the weights' groups of 4"):
        recipe = {"layers": [{"match": "down_proj", "group_size": 4}], **RTN, "passes": [{"name": "runtime_smooth"}]}
        make_plan(load_recipe("W4A4", recipe, group_size=0), program)


@pytest.fixture(scope="module")
def mixed(one_layer, stories_calibration, tmp_path_factory):
    """W4A4 by the default recipe, without rotations online, and one linear at W8A8.

    The table of words is in floating point. The rows of one in 8 bits are integers times a scale, so the first linears'
    4-bit activations lie halfway between two grid points more often, and engines round some of these differently.
    """
    from quantize import quantize_model

    passes = [{"name": "fold_norms"}, {"name": "rotate", "online_hadamard": False}]
    output = tmp_path_factory.mktemp("mixed") / "artifact"
    recipe = {**MIXED, "passes": passes, "quantizer": {"name": "gptq"}, "activations": {"clip_ratio": 1.0}}
    recipe["tables"] = ["lm_head"]
    given = {"calibration": stories_calibration, "group_size": 0, "nsamples": 4, "seqlen": 32}
    return quantize_model(one_layer, output_dir=output, scheme="W4A4", recipe=recipe, **given)


def test_an_artifact_holds_each_scheme_and_says_so(mixed):
    assert mixed.manifest["schemes"] == {"W4A4": 6, "W8A8": 1, "W8A16": 1}
    assert ": W4A4 in 6 linears, W8A8 in 1, W8A16 in 1, " in mixed.summary()
    modules = mixed.manifest["quantization"]["modules"]
    assert [path for path, entry in modules.items() if "scheme" in entry] == [DOWN, "lm_head"]
    bits = {
        path: (module.scheme.label, module.qweight.dtype)
        for path, module in load(mixed.directory).named_modules()
        if isinstance(module, QuantizedLinear)
    }
    assert bits.pop(DOWN) == ("W8A8", torch.int8)
    assert bits.pop("lm_head") == ("W8A16", torch.int8)
    assert set(bits.values()) == {("W4A4", torch.uint8)}
    assert verify_artifact(mixed.directory)["difference"] < 1e-5


def test_a_dry_run_tells_both(cli, one_layer, tmp_path):
    recipe = tmp_path / "mixed.toml"
    passes = 'passes = [{ name = "fold_norms" }, { name = "rotate" }]'
    recipe.write_text(f'{passes}\n[[layers]]\nmatch = "re:.*down_proj"\nscheme = "W8A8"\n')
    options = ["--group-size", "0", "--nsamples", "2", "--seqlen", "16", "--recipe", recipe]
    shown = cli(one_layer, "--scheme", "W4A4", *options, "--dry-run")
    assert shown.code == 0
    assert "6 linears to W4A4, 1 to W8A8, 1 to W8A16, in 3 blocks" in shown.out
    assert "tables of words in 8 bits: model.embed_tokens\n" in shown.out


@pytest.mark.slow
@pytest.mark.usefixtures("on_triton")
def test_kernels_multiply_each_linear_by_its_scheme(mixed):
    model, ids = load(mixed.directory), torch.arange(12)[None]
    with torch.no_grad():
        found = model(ids).logits
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.forward = module._forward_reference
        expected = model(ids).logits
    assert (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.slow
def test_onnx_runtime_runs_both(mixed, cli, tmp_path):
    parity = export_artifact(mixed.directory, "onnx", tmp_path / "onnx")
    assert parity["emulation"] < 1e-5
    assert json.loads((tmp_path / "onnx" / "ort_config.json").read_text())["precisions"] == {INTEGERS: 7, CAST: 1}
    shown = cli("run", tmp_path / "onnx", "--prompt", "Once upon a time", "--max-new-tokens", 4)
    assert (shown.code, bool(shown.out.strip())) == (0, True)


def test_compressed_tensors_have_a_group_for_each_scheme(mixed, tmp_path):
    parity = export_artifact(mixed.directory, "compressed-tensors", tmp_path / "ct")
    assert parity["reference"] < 1e-4 + 2 * parity["activations"]
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    groups = {
        (group["weights"]["num_bits"], group["input_activations"]["num_bits"]): group["targets"]
        for group in config["config_groups"].values()
    }
    assert groups[8, 8] == [DOWN]
    assert len(groups[4, 4]) == 6 and "Linear" not in groups[4, 4]
    assert np.isfinite(list(parity.values())).all()
