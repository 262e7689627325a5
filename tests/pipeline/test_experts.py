"""Experts are rounded on the rows that reach them, and a run tells which it knows too little of."""

import json

import pytest
import torch
from helpers.mixtures import Mixture
from rich.console import Console

from quantize.artifact.load import load
from quantize.calibration.runner import SequentialRunner
from quantize.errors import QuantizeError
from quantize.graph.export import export_program
from quantize.graph.interpreter import Overrides
from quantize.pipeline.context import RunContext
from quantize.pipeline.plan import make_plan
from quantize.pipeline.quantize import quantize_model
from quantize.pipeline.steps.all_experts import AllTokens
from quantize.pipeline.steps.expert_rows import ExpertRows
from quantize.pipeline.steps.experts import ExpertRounder, shrunk
from quantize.quantizers.gptq import GPTQ
from quantize.quantizers.rtn import RoundToNearest
from quantize.recipe.recipe import load_recipe
from quantize.scheme.scheme import ActivationArgs
from quantize.transforms.online import InputTransform

PLAIN = InputTransform()
SETTINGS = {"nsamples": 24, "seqlen": 16, "group_size": 0}


def make_mixture(inner=24):
    """Return a mixture whose last expert no token reaches."""
    torch.manual_seed(0)
    model = Mixture(inner=inner).eval()
    with torch.no_grad():
        model.words.weight.abs_()
        model.mix.weight.mul_(0.1)
        model.chooser.weight[-1] = -10
    return model


@pytest.fixture(scope="module")
def mixture():
    return make_mixture()


@pytest.fixture(scope="module")
def analysed():
    program = export_program(Mixture())
    return program, {linear.path: linear for linear in program.all_linears}


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    rows = torch.randint(32, (24, 16), generator=torch.Generator().manual_seed(1))
    path = tmp_path_factory.mktemp("ids") / "ids.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": row.tolist()}) for row in rows))
    return path


@pytest.fixture
def run(mixture, calibration, tmp_path):
    """Quantize the mixture; a function."""

    def quantize(recipe=None, scheme="W4A8", output="out", **arguments):
        return quantize_model(
            mixture,
            output_dir=tmp_path / output,
            scheme=scheme,
            recipe=recipe,
            calibration=calibration,
            **SETTINGS,
            **arguments,
        )

    return quantize


def values(program, linear, x, ends, tokens):
    """What stands in front of a product of experts."""
    made = {linear.source: x, linear.offsets: torch.tensor(ends, dtype=torch.int32)}
    return made | {program.token_of_row[linear.offsets]: torch.tensor(tokens)}


def test_rows_are_paired_by_token_and_expert(analysed):
    program, linears = analysed
    fall, x = linears["fall"], torch.arange(5.0)[:, None].expand(-1, 24)
    quantized = values(program, fall, x, [2, 3, 3, 5], [1, 2, 0, 0, 2])
    other = values(program, fall, x + 10, [1, 3, 4, 5], [2, 0, 1, 2, 1])
    rows = ExpertRows(program, fall, [quantized], [other])
    assert rows.counts == [2, 1, 0, 2]
    pairs = [[x[:, 0].tolist() for x in pair] for e in range(4) for pair in rows.of(e, PLAIN)]
    assert pairs == [
        [[0, 1], [0, 10]],  # token 1 went elsewhere in the float model, and stays as it is; token 2 is its row 0
        [[2], [11]],
        [[], []],
        [[3, 4], [3, 4]],  # the float model sent token 1 there
    ]
    assert torch.equal(quantized[fall.source], x)


def test_rows_of_tokens_are_paired_whatever_their_experts(analysed):
    program, linears = analysed
    rise, x = linears["rise"], torch.arange(4.0)[:, None].expand(-1, 16)
    quantized = values(program, rise, x, [2, 3, 3, 4], [1, 2, 0, 0])
    other = values(program, rise, x + 10, [1, 2, 3, 4], [0, 1, 2, 2])
    (pair,) = ExpertRows(program, rise, [quantized], [other]).of(0, PLAIN)
    assert pair[1][:, 0].tolist()[0] == 11
    assert pair[1][:, 0].tolist()[1] in (12, 13)
    turned = PLAIN.__class__(activations=ActivationArgs(num_bits=4))
    (rounded,) = ExpertRows(program, rise, [quantized]).of(1, turned)
    assert torch.equal(rounded[1], x[2:3])


def test_all_tokens_reach_every_expert(analysed, mixture):
    program, linears = analysed
    state = Overrides({name: p.detach() for name, p in mixture.named_parameters()})
    ids = torch.randint(32, (2, 16), generator=torch.Generator().manual_seed(2))
    runner, rise, fall = SequentialRunner(program, [ids]), linears["rise"], linears["fall"]
    segment = next(s for s in program.segments if rise.node in s.nodes)
    runner.run(segment.nodes[: segment.nodes.index(rise.node)], state)
    (before,) = runner.values
    with torch.no_grad():
        x = mixture.words(ids)
        x = (x + mixture.mix(x.transpose(1, 2)).transpose(1, 2)).flatten(0, 1)
    for expert in (0, 3):
        ahead = AllTokens(program, rise, fall, [before], [before], (state, state))
        ((found, reference),) = ahead.of(expert, PLAIN)
        torch.testing.assert_close(found, (x @ mixture.rise[expert].T).relu().detach())
        assert torch.equal(found, reference)
        ((tokens, _),) = AllTokens(program, rise, rise, [before], [], (state, state)).of(expert, PLAIN)
        torch.testing.assert_close(tokens, x)
    assert ahead.counts == [32] * 4
    assert ExpertRows(program, rise, [before]).counts[3] == 0


class Fixed:
    """Rows that are given."""

    counts = (0, 3, 40)

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.rows = [torch.randn(n, 8, generator=generator) * (n + 1) for n in self.counts]

    def of(self, expert, _):
        yield self.rows[expert], self.rows[expert]


def test_an_expert_of_few_rows_is_drawn_towards_all(analysed):
    rows, (_, linears) = Fixed(), analysed
    linear = linears["rise"].__class__(**{**vars(linears["rise"]), "columns": 8, "experts": 3})

    class Block:
        input_transforms, product_dtype = {linear: PLAIN}, torch.float32

    rounder = ExpertRounder([linear], Block, GPTQ(), rows, RunContext(0))
    own, pooled = rounder._gram([1], 3), rounder._gram(range(3), 43)
    X = rows.rows
    torch.testing.assert_close(own.value, X[1].T @ X[1])
    every = (X[1].T @ X[1] + X[2].T @ X[2]) / 43
    torch.testing.assert_close(pooled.value / 43, every)
    weight = 3 / (3 + 8)
    torch.testing.assert_close(shrunk(own, pooled, 8).value, weight / 3 * X[1].T @ X[1] + (1 - weight) * every)
    many = rounder._gram([2], 40)
    torch.testing.assert_close(shrunk(many, pooled, 8).value, X[2].T @ X[2])


def plainly(mixture, artifact):
    """Return the experts of `fall` that were rounded to nearest."""
    stack = artifact.module
    W = mixture.fall.detach().mT.flatten(0, 1)
    plain = RoundToNearest().quantize(W, stack.scheme.weights, None, torch.float32)
    return [e for e in range(4) if torch.equal(stack.expert(e).qweight, plain.data[e * 16 : (e + 1) * 16])]


def loaded(run, **arguments):
    artifact = run(**arguments)
    model = load(artifact.directory, skeleton=Mixture())
    artifact.__dict__["module"], artifact.__dict__["model"] = model.fall, model
    return artifact


NO_PASSES = {"passes": [], "quantizer": {"name": "gptq"}}


def test_a_run_counts_the_tokens_of_each_expert_and_warns_of_those_without(run, mixture):
    console = Console(record=True, width=200)
    artifact = loaded(run, recipe=NO_PASSES, scheme="W4A16", console=console)
    tokens = artifact.manifest["expert_tokens"]
    assert tokens.keys() == {"rise", "fall"}
    assert tokens["rise"] == tokens["fall"]
    assert sum(tokens["rise"]) == 2 * artifact.manifest["calibration"]["tokens"]
    assert tokens["rise"][3] == 0 < min(tokens["rise"][:3])
    assert "warning: 2 of 8 stacked experts saw no calibration token" in console.export_text()
    assert plainly(mixture, artifact) == [3]
    ids = torch.arange(32)[None]
    with torch.no_grad():
        wanted, found = mixture(ids), artifact.model(ids)
    assert float((wanted - found).norm() / wanted.norm()) < 0.2


def test_all_experts_are_calibrated_if_asked_for(run, mixture):
    console = Console(record=True, width=200)
    recipe = NO_PASSES | {"calibrate_all_experts": True}
    artifact = loaded(run, recipe=recipe, scheme="W4A16", console=console)
    assert plainly(mixture, artifact) == []
    assert artifact.manifest["expert_tokens"]["fall"][3] == 0
    assert "stacked experts saw no" not in console.export_text()


def test_each_expert_is_judged_on_its_own_rows(run, mixture, monkeypatch):
    """GPTQ's first expert is broken, and gets plain rounding."""
    rounding, calls = GPTQ.quantize_weights, []

    def broken(self, weights, *args):
        calls.append(weights[0].shape)
        spoilt = calls.count(torch.Size([16, 24])) == 1 and weights[0].shape == (16, 24)
        return rounding(self, [W * 1.5 if spoilt else W for W in weights], *args)

    monkeypatch.setattr(GPTQ, "quantize_weights", broken)
    artifact = loaded(run, recipe=NO_PASSES, scheme="W4A16")
    assert "fall.0" in artifact.manifest["held_out"]["rounded_plainly"]
    assert 0 in plainly(mixture, artifact)


def test_each_expert_of_nvfp4_is_rounded_on_its_own_rows_with_a_global_scale_of_its_own(calibration, tmp_path):
    model, settings = make_mixture(inner=32), SETTINGS | {"group_size": None}
    artifact = quantize_model(
        model, output_dir=tmp_path / "out", scheme="NVFP4", recipe=NO_PASSES, calibration=calibration, **settings
    )
    stack = load(artifact.directory, skeleton=Mixture(inner=32)).fall
    assert stack.global_scale.shape == (64, 1)
    plain = [RoundToNearest().quantize(W, stack.scheme.weights, None, torch.float32) for W in model.fall.detach().mT]
    assert [e for e in range(4) if torch.equal(stack.expert(e).qweight, plain[e].data)] == [3]
    assert all(torch.equal(stack.expert(e).global_scale, plain[e].global_scale) for e in range(4))


def test_what_chooses_experts_stays_unless_a_recipe_names_it(analysed):
    program, _ = analysed
    skipped = make_plan(load_recipe("W4A8", None, group_size=0), program).skipped
    assert skipped["chooser.weight"] == "ignored by 'chooser'"
    named = {"layers": [{"match": "chooser", "scheme": "W8A8"}]}
    assert make_plan(load_recipe("W4A8", named, group_size=0), program).schemes["chooser"].label == "W8A8"
    assert "chooser" in make_plan(load_recipe("W4A8", {"ignore": []}, group_size=0), program).schemes


def test_an_artifact_whose_experts_do_not_fit_is_refused(run):
    artifact = run(recipe={"passes": [], "quantizer": {"name": "rtn"}}, scheme="W4A16")
    with pytest.raises(QuantizeError, match=r"rise is \[2, 24, 16\] in the model, and its experts in the artifact"):
        load(artifact.directory, skeleton=Mixture(experts=2))
