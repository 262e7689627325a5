"""A run keeps weights that lie on a grid already, says so, and lets nobody change them unless asked to."""

from __future__ import annotations

import re
import shutil
import tomllib
from types import SimpleNamespace

import pytest
import torch
from helpers import quantized_sources
from helpers.quantized_sources import is_linear, tensors_of
from helpers.weights import rounded_to_levels, rounded_to_q4_0, rounded_to_q4_1
from safetensors.torch import load_file, save_file

import quantize
from quantize.checkpoint.opening import open_checkpoint
from quantize.errors import UsageError
from quantize.graph.fallback.program import make_program
from quantize.pipeline import grid_choice
from quantize.pipeline.context import RunContext
from quantize.pipeline.grids import plan_with_grids
from quantize.quantizers.grid import on_grid
from quantize.quantizers.rtn import RoundToNearest
from quantize.recipe.recipe import load_recipe


def on_grids(directory, change):
    """Write a tiny Llama whose linears are rounded."""
    quantized_sources.small_llama(directory)
    tensors = {k: change(x) if is_linear(k) else x for k, x in tensors_of(directory).items()}
    return quantized_sources.rewrite(directory, tensors)


def rounded_copy(source, directory, change):
    """Copy a model, its linears rounded."""
    shutil.copytree(source, directory)
    tensors = {k: change(x) if is_linear(k) else x for k, x in tensors_of(directory).items()}
    return quantized_sources.rewrite(directory, tensors)


def seven(W):
    return rounded_to_levels(W, 7)


def above_zero(W):
    """Round to 0 to 15 steps in groups of 32."""
    groups = W.unflatten(1, (-1, 32)).abs()
    d = groups.amax(-1, keepdim=True) / 15
    return ((groups / d).round() * d).flatten(1)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """Return a function that plans for a model; its graph is made once."""
    first = open_checkpoint(quantized_sources.small_llama(tmp_path_factory.mktemp("first")))
    program = make_program(first, first.skeleton(), 32)

    def plan(directory, scheme, changes=None, **settings):
        return plan_with_grids(load_recipe(scheme, changes, **settings), program, open_checkpoint(directory))

    return plan


def test_a_plan_keeps_grids_and_takes_their_groups(tmp_path, planned):
    plan = planned(on_grids(tmp_path, rounded_to_q4_0), "W4A8")
    assert plan.note == "14 of 14 linears already lie on a grid of 16 levels in groups of 32: kept exactly"
    assert {scheme.weights.group_size for scheme in plan.reader_schemes.values()} == {32}
    assert {f"{path}.weight" for path in plan.kept} == plan.reader_schemes.keys()
    assert [len(step.sites) + len(step.online) for step in plan.steps] == [0, 0]
    assert load_recipe(None, tomllib.loads(plan.recipe.to_toml())).weights.group_size == 32
    assert planned(tmp_path, "W4A8", requantize=True).kept == {}
    assert any(step.sites for step in planned(tmp_path, "W4A8", requantize=True).steps)


def test_a_grid_of_rows_holds_in_any_groups(tmp_path, planned):
    plan = planned(on_grids(tmp_path, seven), "W4A16", group_size=16)
    assert plan.note == "14 of 14 linears already lie on a grid of 7 levels in each row: kept exactly"
    assert planned(tmp_path, "W4A16", {"weights": {"symmetric": True}}).kept
    assert planned(tmp_path, "W3A16", group_size=16).note == plan.note


def test_three_bits_hold_eight_levels_in_the_groups_of_the_grid(tmp_path, planned):
    assert not planned(on_grids(tmp_path / "16", rounded_to_q4_0), "W3A16").note
    eight = on_grids(tmp_path / "8", lambda W: rounded_to_levels(W.unflatten(1, (-1, 32)).flatten(0, 1), 7).view_as(W))
    plan = planned(eight, "W3A16")
    assert plan.note == "14 of 14 linears already lie on a grid of 7 levels in groups of 32: kept exactly"
    with pytest.raises(UsageError, match="give --group-size 32 or none"):
        planned(eight, "W3A16", group_size=0)


def test_a_group_size_that_does_not_fit_names_the_one_that_does(tmp_path, planned):
    on_grids(tmp_path, rounded_to_q4_0)
    with pytest.raises(UsageError, match=r"group size 0 does not fit: 14 of .* give --group-size 32 or none"):
        planned(tmp_path, "W4A16", group_size=0)
    assert planned(tmp_path, "W4A16", group_size=16).kept
    assert not planned(tmp_path, "W4A16", group_size=0, requantize=True).kept


def test_what_is_not_kept_is_said(tmp_path, planned):
    on_grids(tmp_path, rounded_to_q4_0)
    plan = planned(tmp_path, "W4A4")
    assert plan.note.endswith("rounded anew, since 4-bit activations need the recipe's transforms; a recipe with "
                              "passes = [] keeps it")  # fmt: skip
    assert not plan.kept
    assert planned(tmp_path, "W4A4", {"passes": []}).kept
    assert planned(tmp_path, "W4A16", {"weights": {"symmetric": True}}).kept
    on_grids(tmp_path, above_zero)
    plan = planned(tmp_path, "W4A16", {"weights": {"symmetric": True}})
    assert plan.note.endswith("in groups of 32, which needs zero points: rounded anew")


def test_levels_without_zero_are_kept_if_activations_stay_in_floating_point(tmp_path, planned, small_run):
    """As SmolLM2's, stored in bfloat16."""
    directory = on_grids(tmp_path / "model", lambda W: rounded_to_q4_1(W + 0.02).bfloat16())
    found = "14 of 14 linears already lie on a grid of 16 levels without zero in groups of 32"
    assert planned(directory, "W4A16").note == f"{found}: kept exactly"
    with pytest.raises(UsageError, match=r"group size 0 does not fit: 14 of .* give --group-size 32 or none"):
        planned(directory, "W4A16", group_size=0)
    for plan in (planned(directory, "W4A8"), planned(directory, "W4A16", {"weights": {"symmetric": True}})):
        assert plan.note == f"{found}, which needs zero points and activations in floating point: rounded anew"
    ids = torch.randint(2, 64, (4, 32), generator=torch.Generator().manual_seed(0))
    artifact = small_run(directory, "W4A16", calibration=ids, group_size=32)
    assert len(artifact.manifest["kept_grids"]) == 14
    before, modules = tensors_of(directory), dict(artifact.load().named_modules())
    for path in artifact.manifest["kept_grids"]:
        W = before[f"{path}.weight"].float()
        assert (modules[path].qtensor().dequantize() - W).abs().max() < 2**-8 * W.abs().max()


@pytest.fixture(scope="module")
def books_on_grids(books, tmp_path_factory):
    """Return books-llama with its linears rounded to Q4_0."""
    return rounded_copy(books, tmp_path_factory.mktemp("books") / "model", rounded_to_q4_0)


def test_the_plan_that_loses_less_is_taken(tmp_path, planned, monkeypatch):
    for scheme in ("W4A8", "W4A4"):
        directory = tmp_path / scheme
        plan = planned(on_grids(directory, rounded_to_q4_0), scheme)
        assert bool(plan.kept) != bool(plan.alternative.kept)
        rows = SimpleNamespace(rows=(1,), generates=True)
        prepared = SimpleNamespace(plan=plan, held_out=rows, program=SimpleNamespace(export_error=""))
        for losses in ((0.1, 0.2), (0.2, 0.1)):
            monkeypatch.setattr(grid_choice, "measure", lambda *_, found=losses: found)
            taken = grid_choice.choose_grids(prepared, RunContext())
            assert (bool(taken.kept), taken.alternative) == (losses[0] < losses[1], None)
            assert taken.note.endswith("(0.1000 and 0.2000 KL on rows held back)")
        rows.rows = ()
        assert grid_choice.choose_grids(prepared, RunContext()) is plan


def test_integers_of_8_bits_are_kept_at_w8a8(tmp_path):
    directory = quantized_sources.compressed(
        tmp_path / "model", "int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True
    )
    checkpoint = open_checkpoint(directory)
    program = make_program(checkpoint, checkpoint.skeleton(), 32)
    plan = plan_with_grids(load_recipe("W8A8", None), program, checkpoint)
    assert re.fullmatch(r"14 of 14 linears already lie on a grid of 25\d levels in each row: kept exactly", plan.note)
    for linear in (x for x in program.all_linears if x.path in plan.kept):
        W = checkpoint.float_tensor(linear.weight)
        found = on_grid(W, plan.schemes[linear.path].weights, torch.bfloat16)
        assert torch.equal(found.dequantize(), W)


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "kept"), [("W4A8", 42), ("W4A4", 0)])
def test_what_loses_less_on_rows_held_back_is_taken(tmp_path, books_on_grids, scheme, kept):
    """A trained model: at 8-bit activations exact weights lose less, at 4 bits transforms do."""
    artifact = quantize.quantize_model(
        books_on_grids, scheme=scheme, output_dir=tmp_path / "out", nsamples=4, seqlen=64, group_size=32
    )
    manifest = artifact.manifest
    assert len(manifest.get("kept_grids", ())) == kept
    words = "which loses less than the recipe's transforms" if kept else "need the recipe's transforms"
    assert re.search(rf"{words}.* \(\d\.\d{{4}} and \d\.\d{{4}} KL on rows held back\)", manifest["grids"])
    first, second = map(float, re.search(r"\((\S+) and (\S+) KL", manifest["grids"]).groups())
    assert first < second


@pytest.mark.slow
@pytest.mark.parametrize(("model", "change"), [("books", rounded_to_q4_0), ("stories", seven)])
def test_outputs_are_exactly_those_of_the_float_model(request, books_heldout, tmp_path, model, change):
    directory = rounded_copy(request.getfixturevalue(model), tmp_path / "model", change)
    quantize.quantize_model(directory, scheme="W4A16", output_dir=tmp_path / "out", nsamples=4, seqlen=64)
    found = quantize.evaluate(tmp_path / "out", against=directory, text=books_heldout, nsamples=4, seqlen=64)
    assert (found["kl"], found["top1"]) == (0, 1)


@pytest.mark.slow
def test_a_grid_of_mxfp4_is_measured_without_calibration_data(tmp_path, books):
    args = load_recipe("MXFP4", None).weights

    def change(W):
        return RoundToNearest().quantize(W.float(), args, None, torch.float32).dequantize()

    recipe = {"quantizer": {"name": "rtn"}, "passes": [{"name": "fold_norms"}, {"name": "rotate"}]}
    artifact = quantize.quantize_model(
        rounded_copy(books, tmp_path / "model", change), scheme="MXFP4", recipe=recipe,
        output_dir=tmp_path / "out", nsamples=4, seqlen=32,
    )  # fmt: skip
    assert artifact.manifest["calibration"]["rows"] == 0
    assert len(artifact.manifest["kept_grids"]) == 42
    words = r"42 linears .* kept exactly, which loses less than the recipe's transforms \(0\.\d+ and 0\.\d+ KL on rows"
    assert re.search(words, artifact.manifest["grids"])


def test_grids_of_few_weights_decide_nothing(tmp_path, planned):
    on_grids(tmp_path, lambda W: rounded_to_q4_0(W) if W.shape == (32, 64) else W)
    plan = planned(tmp_path, "W4A8")
    assert (plan.note, plan.kept) == ("", {})


def test_floats_are_on_no_grid(tmp_path, planned):
    assert planned(quantized_sources.small_llama(tmp_path), "W4A16").note == ""


def test_a_run_keeps_the_integers(tmp_path, small_run):
    """One weight off its grid is rounded anew with its linear alone."""
    directory = on_grids(tmp_path / "model", rounded_to_q4_0)
    tensors, off = tensors_of(directory), "model.layers.1.mlp.up_proj"
    tensors[f"{off}.weight"][50, 7] *= 1.3  # a row that the plan does not look at
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    ids = torch.randint(2, 64, (4, 32), generator=torch.Generator().manual_seed(0))
    artifact = small_run(directory, "W4A16", calibration=ids, group_size=None)
    assert len(artifact.manifest["kept_grids"]) == 13
    assert off not in artifact.manifest["kept_grids"]
    model = artifact.load()
    for name, module in model.named_modules():
        if name in artifact.manifest["kept_grids"]:
            assert torch.equal(module.qtensor().dequantize(), tensors[f"{name}.weight"])


@pytest.mark.slow
def test_mxfp4_experts_keep_their_codes(tmp_path, small_run):
    directory = quantized_sources.mxfp4_experts(tmp_path / "model")
    ids = torch.randint(2, 64, (4, 32), generator=torch.Generator().manual_seed(0))
    small_run(directory, "MXFP4", calibration=ids, group_size=None)
    source, stored = tensors_of(directory), {}
    for path in (tmp_path / "out").glob("model-*.safetensors"):
        stored |= load_file(path)
    name = "model.layers.0.mlp.experts.down_proj"
    blocks = source[f"{name}_blocks"].flatten(-2).flatten(0, 1)
    codes = blocks - 8 * (blocks & 15 == 8).byte() - 128 * (blocks >> 4 == 8).byte()  # -0 is stored as 0
    assert torch.equal(stored[f"{name}.qweight"].view(codes.shape), codes)
    assert torch.equal(stored[f"{name}.scale"].view(-1), source[f"{name}_scales"].view(-1))
