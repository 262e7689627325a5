"""A budget of bits goes where rounding costs most, on a small real model."""

from __future__ import annotations

import json
import shutil
import tomllib
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.json_files import change_json
from helpers.mixtures import build_family
from safetensors.torch import load_file

from quantize.calibration.data import spread
from quantize.calibration.logits import divergence
from quantize.calibration.statistics import Gram
from quantize.checkpoint.opening import open_checkpoint
from quantize.errors import UsageError
from quantize.formats.fake_quantize import fake_quantize
from quantize.pipeline.bit_options import check_average_bits, units_of
from quantize.pipeline.context import RunContext
from quantize.pipeline.mixed_precision import rounded_alone
from quantize.pipeline.mixed_precision.measure import ROWS, measure, split
from quantize.pipeline.mixed_precision.resolve import only
from quantize.pipeline.plan import LeftOut, made_anew, make_plan
from quantize.pipeline.prepare import prepare
from quantize.quantizers.gptq import GPTQ
from quantize.quantizers.rtn import RoundToNearest
from quantize.recipe.recipe import load_recipe

PLAIN = {"quantizer": {"name": "rtn"}, "passes": []}
GPTQ_BITS = {"quantizer": {"name": "gptq"}, "average_bits": 5.0}
DATA = {"nsamples": 4, "seqlen": 64}


@pytest.fixture(scope="module")
def two_layers(books, tmp_path_factory):
    """Return the first two layers of books-llama-6m."""
    directory = tmp_path_factory.mktemp("bits") / "model"
    shutil.copytree(books, directory)
    change_json(directory / "config.json", num_hidden_layers=2)
    return directory


def stored(directory, linears):
    """Return the bits that the weights of some linears take in the files."""
    tensors = {k: v for path in directory.glob("model-*.safetensors") for k, v in load_file(path).items()}
    parts = [f"{linear}.{part}" for linear in linears for part in ("qweight", "scale", "zero_point")]
    return sum(8 * tensors[name].nbytes for name in parts if name in tensors)


def entries_of(recipe, part):
    """Return what the recipe says of the linears of one kind, by layer."""
    found = [dict(entry) for entry in recipe["layers"] if entry["match"].endswith(part)]
    return [(entry.pop("match").split(".")[2], entry) for entry in found]


@pytest.mark.slow
def test_the_budget_is_kept_and_the_recipe_gives_the_same_artifact(small_run, two_layers):
    data = {"group_size": None, **DATA}
    given = small_run(two_layers, "W4A16", recipe=PLAIN, average_bits=4.6, **data)
    sizes = {name.removesuffix(".weight"): W.numel() for name, W in load_file(two_layers / "model.safetensors").items()}
    linears = [path for path in sizes if "proj" in path and int(path.split(".")[2]) < 2]
    bits = stored(given.directory, linears) / sum(sizes[path] for path in linears)
    record = given.manifest["average_bits"]
    assert 4.5 < bits <= 4.6
    assert (record["asked"], record["stored"]) == (4.6, pytest.approx(bits))
    assert sum(record["linears"].values()) == len(linears) == 14
    assert len(record["linears"]) > 2
    recipe = tomllib.loads((given.directory / "recipe.toml").read_text())
    assert "average_bits" not in recipe
    q, k, v = (entries_of(recipe, part) for part in ("q_proj", "k_proj", "v_proj"))
    assert q == k == v  # which a runtime joins to one product
    again = small_run(two_layers, None, "again", recipe=given.directory / "recipe.toml", **data)
    for path in given.directory.glob("model-*.safetensors"):
        assert path.read_bytes() == (again.directory / path.name).read_bytes()


@pytest.mark.slow
def test_a_budget_between_3_and_4_bits_takes_linears_of_both(small_run, two_layers):
    given = small_run(two_layers, "W3A16", recipe=PLAIN, average_bits=3.7, group_size=None, **DATA)
    assert 3.6 < given.manifest["average_bits"]["stored"] <= 3.7
    assert given.manifest["schemes"].keys() >= {"W3A16", "W4A16"}


@torch.no_grad()
def alone(prepared, directory, unit):
    """Return the KL of transformers' own model with one unit rounded plainly, in nats per token."""
    floats, model = (open_checkpoint(directory).load() for _ in range(2))
    for linear in unit.linears:
        module, scheme = model.get_submodule(linear.path), prepared.plan.schemes[linear.path]
        module.weight.copy_(RoundToNearest().quantize(module.weight, scheme.weights, None, torch.float32).dequantize())
        module.register_forward_pre_hook(lambda _, x, args=scheme.activations: (fake_quantize(x[0], args),))
    ids = torch.stack([row["input_ids"] for row in spread(prepared.samples.rows, ROWS)])
    y, expected = (x(input_ids=ids).logits.flatten(0, 1) for x in (model, floats))
    return divergence(y, expected, ids.flatten()).mean("kl")


@pytest.mark.slow
def test_measured_losses_foretell_what_rounding_each_unit_does(two_layers):
    prepared = prepare(two_layers, load_recipe("W4A8", PLAIN | {"average_bits": 5.0}, **DATA), None)
    units = units_of(prepared.plan, prepared.program, prepared.checkpoint)
    losses = measure(prepared, units, RunContext())
    true = [alone(prepared, two_layers, unit) for unit in units]
    assert len(units) == 8
    assert np.corrcoef(np.log([row[0] for row in losses]), np.log(true))[0, 1] > 0.9
    assert sum(row[0] for row in losses) == pytest.approx(sum(true), rel=0.3)
    for unit, row in zip(units, losses, strict=True):
        sizes = [option.scheme.weights.group_size or 1000 for option in unit.options[:-1]]
        assert row[sizes.index(32)] < row[0] < row[sizes.index(1000)]
        assert row[-1] < 0.2 * row[0]  # 8 bits


def inputs_by_hand(model, rows, path):
    """Return the inputs [tokens, K] of a linear of transformers' own model on some rows."""
    found = list[torch.Tensor]()
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, x: found.append(x[0].flatten(0, 1)))
    for row in rows:
        model(input_ids=row["input_ids"][None])
    hook.remove()
    return torch.cat(found)


@torch.no_grad()
def errors_by_hand(prepared, directory, path, scheme, how):
    """Return the mean error of a linear's outputs, rounded as a whole on transformers' own inputs of the rows."""
    model, (judged, fit), gram = open_checkpoint(directory).load().float(), split(prepared.samples.rows), Gram()
    W, x = model.get_submodule(path).weight, inputs_by_hand(model, judged, path)
    gram.update(inputs_by_hand(model, fit, path))
    W_hat = how.quantize(W, scheme.weights, gram, torch.bfloat16).dequantize()
    y = x @ W.T
    return float(((x @ W_hat.T - y).square().sum(-1) / y.square().sum(-1)).mean())


@pytest.mark.slow
def test_options_lose_in_the_proportion_of_what_the_quantizer_leaves(two_layers):
    recipe = load_recipe("W4A16", PLAIN | GPTQ_BITS, nsamples=24, seqlen=64)
    prepared = prepare(two_layers, recipe, None)
    units = units_of(prepared.plan, prepared.program, prepared.checkpoint)
    losses = measure(prepared, units, RunContext())
    for unit, row in ((unit, row) for unit, row in zip(units, losses, strict=True) if len(unit.linears) == 1):
        schemes = [option.scheme for option in unit.options]
        found = [errors_by_hand(prepared, two_layers, unit.linears[0].path, x, GPTQ()) for x in schemes]
        for option, error in zip(row, found, strict=True):
            assert option / row[0] == pytest.approx(error / found[0], rel=0.05)


@torch.no_grad()
def alone_by_hand(prepared, directory, unit, behind, alpha):
    """Return the KL of transformers' model with a unit rounded by GPTQ, and the linears behind it fitted to the rest.

    W + α W D H⁻¹ with D = Σ (x' - x) xᵀ and H = Σ x xᵀ, damped as GPTQ does, is as near to W as
    α is to 0, and to the float model's output as it is to 1.
    """
    floats, model = (open_checkpoint(directory).load().float() for _ in range(2))
    (judged, fit), gram = split(prepared.samples.rows), Gram()
    gram.update(inputs_by_hand(floats, fit, unit.linears[0].path))
    for linear in unit.linears:
        W, args = model.get_submodule(linear.path).weight, prepared.plan.schemes[linear.path].weights
        W.copy_(GPTQ().quantize(W, args, gram, torch.bfloat16).dequantize())
    for others in behind if alpha else ():
        x, expected = (inputs_by_hand(m, fit, others.linears[0].path).double() for m in (model, floats))
        H = x.T @ x
        H += (len(H) / len(x) if len(x) < 2 * len(H) else 0.01) * H.diagonal().mean() * torch.eye(len(H))
        for linear in others.linears:
            W = model.get_submodule(linear.path).weight
            W += alpha * (W.double() @ torch.linalg.solve(H, x.T @ (expected - x)).T).float()
    ids = torch.stack([row["input_ids"] for row in judged])
    y, expected = (m(input_ids=ids).logits.flatten(0, 1) for m in (model, floats))
    return divergence(y, expected, ids.flatten()).mean("kl")


@pytest.mark.slow
def test_losses_are_those_of_the_quantizer_and_of_linears_behind_that_make_up_for_it(two_layers):
    """GPTAQ lets them take back a part of the error; nothing is behind the last linear of a block."""
    sums = list[list[float]]()
    for name, alpha in (("gptq", 0.0), ("gptaq", 1.0)):
        quantizer = {"name": name} | ({"alpha": alpha} if alpha else {})
        recipe = PLAIN | GPTQ_BITS | {"quantizer": quantizer}
        prepared = prepare(two_layers, load_recipe("W4A16", recipe, nsamples=28, seqlen=64), None)
        units = units_of(prepared.plan, prepared.program, prepared.checkpoint)
        found = [row[0] for row in measure(prepared, units, RunContext())]
        behind = [units[n + 1 : n + 2] if n % 4 < 3 else [] for n in range(len(units))]
        pairs = zip(units, behind, strict=True)
        true = [alone_by_hand(prepared, two_layers, unit, others, alpha) for unit, others in pairs]
        assert found == pytest.approx(true, rel=0.3)
        sums.append([sum(x for n, x in enumerate(losses) if behind[n]) for losses in (found, true)])
    assert [sums[1][n] / sums[0][n] for n in (0, 1)] == pytest.approx([0.88, 0.88], rel=0.06)


def test_experts_of_a_stack_are_weighed_like_other_linears(tmp_path):
    """The quantizer sees the inputs of all of them, and leaves less than plain rounding."""
    build_family("mixtral").save_pretrained(tmp_path / "model")
    ids = torch.randint(2, 64, (24, 32), generator=torch.Generator().manual_seed(0))
    (tmp_path / "ids.jsonl").write_text("\n".join(json.dumps({"input_ids": row.tolist()}) for row in ids))
    recipe = load_recipe("W4A16", PLAIN | GPTQ_BITS | {"average_bits": 5.6}, nsamples=24, seqlen=32)
    prepared = prepare(tmp_path / "model", recipe, tmp_path / "ids.jsonl")
    units = units_of(prepared.plan, prepared.program, prepared.checkpoint)
    plain = replace(prepared, plan=replace(prepared.plan, quantizer=RoundToNearest()))
    losses, base = (measure(given, units, RunContext()) for given in (prepared, plain))
    experts = [n for n, unit in enumerate(units) if unit.linears[0].experts is not None]
    assert len(experts) == 4
    for n in experts:
        assert losses[n][-1] < 0.02 * losses[n][0]  # 8 bits
        assert 0.2 * base[n][0] < losses[n][0] < base[n][0]


def test_linears_before_one_of_which_a_rotation_is_left_out_are_weighed_apart(two_layers, monkeypatch):
    found, path = list[list[str]](), "model.layers.0.self_attn.{}_proj"

    def note(*given):
        found.append([linear.path for linear in given[1]])
        return [1.0] * len(given[2])

    monkeypatch.setattr(rounded_alone, "part_errors", note)
    recipe = PLAIN | {"passes": [{"name": "rotate", "residual": False, "where_useful": True}], "average_bits": 5.0}
    prepared = prepare(two_layers, load_recipe("W4A4", recipe, **DATA), None)
    for harmful in ([], [path.format("q")]):
        plan = made_anew(prepared.plan, prepared.program, prepared.plan.given, LeftOut(frozenset(), frozenset(harmful)))
        units = units_of(plan, prepared.program, prepared.checkpoint)
        measure(replace(prepared, plan=plan), units, RunContext())
    q, *kv = map(path.format, "qkv")
    assert found.count([q, *kv]) == found.count([q]) == found.count(kv) == 1


REFUSED = {
    "too few": (
        {"average_bits": 3.5},
        r"is 3\.5, and these weights take 4\.\d+ bits at least, .* give 4\.\d+ or more, or the scheme W3A16$",
    ),
    "decided": (
        {"average_bits": 5, "layers": [{"match": "re:.*proj", "scheme": "W8A16"}]},
        "has no linear to decide for, as layers or grids",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_before_the_run(name, program, one_layer):
    change, words = REFUSED[name]
    plan = make_plan(load_recipe("W4A16", PLAIN | change), program)
    with pytest.raises(UsageError, match=words):
        check_average_bits(plan, program, open_checkpoint(one_layer))


def test_fp4_has_no_other_groups(program, one_layer):
    plan = make_plan(load_recipe("MXFP4", PLAIN | {"average_bits": 5, "ignore": ["re:.*down_proj"]}), program)
    with pytest.raises(UsageError, match="among integers and code books, and the weights are MXFP4; leave it out"):
        check_average_bits(plan, program, open_checkpoint(one_layer))


@pytest.mark.slow
def test_a_code_book_shares_a_budget_with_integers_of_8_bits(small_run, two_layers):
    recipe = PLAIN | {"weights": {"format": "iq4_nl"}}
    given = small_run(two_layers, "W4A16", recipe=recipe, average_bits=5.2, group_size=None, **DATA)
    assert 5 < given.manifest["average_bits"]["stored"] <= 5.2
    assert given.manifest["schemes"].keys() >= {"W4A16 iq4_nl", "W8A16"}


def test_a_pattern_matches_one_path_alone():
    paths = ["layers.0.fc", "decoder.layers.0.fc", "other"]
    assert only("other", paths) == "other"
    assert only("decoder.layers.0.fc", paths) == "decoder.layers.0.fc"
    assert only("layers.0.fc", paths).startswith("re:")
