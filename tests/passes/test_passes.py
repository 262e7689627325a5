"""Every pass: hand-sized numbers, and one contract that all registered passes must keep."""

import pytest
import torch
from helpers.bases import basis, edge, maxima, place, site
from helpers.soundness import family

from quantize.calibration.runner import SequentialRunner
from quantize.checkpoint.opening import open_checkpoint
from quantize.errors import QuantizeError
from quantize.graph.allowed_transforms import AllowedTransforms
from quantize.graph.export import export_program
from quantize.passes import PASSES
from quantize.passes.ordering import legal_order
from quantize.pipeline.block import Block
from quantize.pipeline.context import RunContext
from quantize.pipeline.plan import make_plan, settings
from quantize.pipeline.steps.global_statistics import collect_global_statistics
from quantize.pipeline.steps.transform import PassRunner
from quantize.recipe.recipe import load_recipe
from quantize.transforms.fold import Diagonal, Rotation, absorb
from quantize.transforms.online import Hadamard


def test_smoothquant_by_hand():
    """s = max|X|^α / max|W|^(1-α), equation 4: with α = 0.75, X = 16, W = 1/16 it is 16^0.75 · 16^0.25 = 16."""
    read = basis(3, [edge("norm.weight", 0, 3, vector=True)], [edge("a.weight", 1, 3), edge("b.weight", 1, 3)])
    weights = {"a.weight": torch.tensor([[1 / 16, 0.5, 1.0]]), "b.weight": torch.tensor([[-1 / 32, 1.0, 0.0]])}
    seen = maxima(16.0, 1.0, 0.0)
    transform = PASSES["smoothquant"](alpha=0.75).transform(site(read, weights, a=seen, b=seen))
    assert isinstance(transform, Diagonal)
    assert torch.allclose(1 / transform.d, torch.tensor([16.0, 1.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize(("name", "folds"), [("llama", True), ("gpt2", True), ("gemma2", False)])
def test_gains_are_folded_where_that_lets_rotations_through(name, folds):
    """The residual stream of Gemma is written by gains, which no rotation passes; its other gains stay as well."""
    plan = make_plan(load_recipe("W4A8", None, group_size=0), family(name).program)
    (fold_norms,) = (step for step in plan.steps if step.handler.name == "fold_norms")
    assert bool(fold_norms.sites) is folds


def test_smoothquant_with_alpha_one_flattens_activations():
    read = basis(2, [edge("n", 0, 2)], [edge("a.weight", 1, 2)])
    given = site(read, {"a.weight": torch.tensor([[3.0, 3.0]])}, a=maxima(8.0, 0.5))
    transform = PASSES["smoothquant"](alpha=1.0).transform(given)
    assert torch.allclose(transform.apply(torch.tensor([8.0, 0.5])), torch.ones(2))


def test_fold_norms_by_hand():
    read = basis(2, [edge("norm.weight", 0, 2, vector=True)], [edge("a.weight", 1, 2)], AllowedTransforms.DIAGONAL)
    weights = {"norm.weight": torch.tensor([4.0, -0.5]), "a.weight": torch.tensor([[1.0, 2.0]])}
    transform = PASSES["fold_norms"]().transform(site(read, weights))
    assert absorb(weights["norm.weight"], read.writers[0], transform.apply).tolist() == [1.0, 1.0]
    assert absorb(weights["a.weight"], read.readers[0], transform.apply_inverse_transpose).tolist() == [[4.0, -1.0]]


def test_a_gain_of_zero_is_folded_into_zero_columns():
    read = basis(2, [edge("norm.weight", 0, 2, vector=True)], [edge("a.weight", 1, 2)], AllowedTransforms.DIAGONAL)
    weights = {"norm.weight": torch.tensor([2.0, 0.0]), "a.weight": torch.tensor([[3.0, 5.0]])}
    transform = PASSES["fold_norms"]().transform(site(read, weights))
    assert absorb(weights["norm.weight"], read.writers[0], transform.apply).tolist() == [1.0, 1.0]
    assert absorb(weights["a.weight"], read.readers[0], transform.apply_inverse_transpose).tolist() == [[6.0, 0.0]]


def test_a_gain_of_zero_under_a_bias_cannot_be_folded():
    writers = [edge("norm.weight", 0, 2, vector=True), edge("norm.bias", 0, 2)]
    read = basis(2, writers, [edge("a.weight", 1, 2)], AllowedTransforms.DIAGONAL)
    weights = {"norm.weight": torch.tensor([1.0, 0.0]), "norm.bias": torch.tensor([1.0, 3.0])}
    with pytest.raises(QuantizeError, match=r"norm\.weight has a gain of zero where norm\.bias.*leave out the pass"):
        PASSES["fold_norms"]().transform(site(read, weights))
    assert PASSES["fold_norms"]().transform(site(read, weights | {"norm.bias": torch.tensor([1.0, 0.0])}))


def test_rotation_by_hand():
    """Signs first, then the Hadamard matrix of order two on each pair."""
    rotation = Rotation(torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64), 2)
    half = 0.5**0.5
    assert torch.allclose(
        rotation.apply(torch.tensor([1.0, 1.0, 2.0, 0.0])), torch.tensor([0.0, 2 * half, 2 * half, 2 * half])
    )


@pytest.mark.parametrize(
    "transform", [Diagonal(torch.tensor([2.0, -3.0, 0.5, 1.0])), Rotation(torch.tensor([1.0, -1.0, -1.0, 1.0]), 4)]
)
def test_a_reader_cancels_a_writer(transform):
    rng = torch.Generator().manual_seed(3)
    x, W = torch.randn(5, 4, generator=rng), torch.randn(6, 4, generator=rng)
    assert torch.allclose(transform.apply(x) @ transform.apply_inverse_transpose(W).T, x @ W.T, atol=1e-5)
    assert torch.allclose(transform.invert(transform.apply(x)), x, atol=1e-6)


def in_front(handler, basis, columns):
    """Settings of what a pass puts in front of a linear."""
    return (
        [t.settings() for t in handler.input_transform(place(basis, columns)).online]
        if handler.transforms_input(basis, columns)
        else []
    )


def test_rotate_goes_online_where_no_weight_can():
    rotate = PASSES["rotate"]()
    heads = basis(16, [edge("v", 0, 16)], [edge("o.weight", 1, 16)], AllowedTransforms.LINEAR, heads=2)
    assert in_front(rotate, None, 12) == [Hadamard(12).settings()]
    assert in_front(rotate, basis(16, [], [edge("d.weight", 1, 16)], AllowedTransforms.NONE), 16) == [
        Hadamard(16).settings()
    ]
    assert in_front(rotate, heads, 32) == [Hadamard(4, 8).settings()]  # four query heads of 8 on two key/value heads
    assert (
        in_front(rotate, basis(16, [edge("e", 1, 16)], [edge("q.weight", 1, 16)], AllowedTransforms.ORTHOGONAL), 16)
        == []
    )
    assert in_front(PASSES["rotate"](online_hadamard=False), None, 12) == []


def pass_runner_for(model, passes, calibration):
    """The passes alone on a real model, without rounding."""
    checkpoint = open_checkpoint(model)
    program = export_program(checkpoint.skeleton())
    recipe = load_recipe("W4A8", {"passes": passes}, group_size=0)
    plan, context = make_plan(recipe, program), RunContext()
    batches = [{"input_ids": ids} for ids in calibration]
    surveys = collect_global_statistics(checkpoint, program, plan, batches, context)
    probes = SequentialRunner(program, [torch.arange(20)[None], torch.arange(40, 20, -1)[None]])
    runner = SequentialRunner(program, calibration)
    return checkpoint, program, PassRunner(program, plan, context, runner, probes, surveys)


def legal(passes):
    return [settings(handler) for handler in legal_order([PASSES.make(p) for p in passes])]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PASSES))
@pytest.mark.parametrize("model", ["stories", "minilm"])
def test_every_pass_goes_through_the_gate_on_real_models(name, model, request):
    before = [{"name": "fold_norms"}] if name != "fold_norms" else []
    calibration = [torch.arange(64).reshape(2, 32)]
    checkpoint, program, pass_runner = pass_runner_for(
        request.getfixturevalue(model), legal([*before, {"name": name}]), calibration
    )
    for segment in program.segments[:3]:  # the others are like these
        block = Block.read(checkpoint, program, segment, pass_runner.plan.schemes, torch.device("cpu"))
        state = pass_runner.apply(block).overrides()
        for runner in (pass_runner.calibration, pass_runner.probes):
            runner.run(segment.nodes, state)
    found = pass_runner.differences
    assert set(found) <= {name, "fold_norms"}
    # post-norm gains cannot be folded; what only rounds otherwise changes no function
    assert name in found or (model, name) == ("minilm", "fold_norms") or PASSES[name].legal is AllowedTransforms.NONE
    assert all(difference < 1e-5 for blocks in found.values() for difference in blocks.values())
