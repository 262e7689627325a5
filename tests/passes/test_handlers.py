"""Handlers that search, by hand-sized numbers and by the inequalities of their papers."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.bases import W4A4, basis, edge, maxima, place, site

from quantize.calibration.statistics import Absmax, Rows
from quantize.checkpoint.opening import open_checkpoint
from quantize.errors import UsageError
from quantize.formats.fake_quantize import fake_quantize
from quantize.graph.allowed_transforms import AllowedTransforms
from quantize.kernels.ops import dequantize, runtime_smooth_linear, smooth_scales
from quantize.passes import PASSES
from quantize.passes.base import input_error
from quantize.passes.scaling import joint_error
from quantize.pipeline.context import RunContext
from quantize.pipeline.plan import make_plan
from quantize.pipeline.steps.global_statistics import collect_global_statistics
from quantize.recipe.recipe import load_recipe
from quantize.scheme.scheme import ActivationArgs, RuntimeSmoothArgs, Scheme, WeightArgs
from quantize.transforms.block_rotation import BlockRotation
from quantize.transforms.fold import Diagonal
from quantize.transforms.online import Blocks, Dual, Hadamard, InputTransform, Shift
from quantize.transforms.wush import wush

INT4 = ActivationArgs(num_bits=4)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def rows_of(X):
    rows = Rows()
    rows.update(X)
    return rows


def normal(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=rng(seed))


# --- scales -------------------------------------------------------------------------------------------------------


def scaled_site(seed=0):
    """One linear on 32 channels, some of them large in the activations, some in the weights."""
    X = normal(256, 32, seed) * torch.logspace(0, 1.5, 32)[torch.randperm(32, generator=rng(seed))]
    W = normal(16, 32, seed + 1) * torch.logspace(0, 1, 32)
    reader = basis(32, [edge("n", 0, 32)], [edge("a.weight", 1, 32)])
    return site(reader, {"a.weight": W}, a=rows_of(X))


def test_joint_error_by_hand():
    """W = X = [7, 1] lie on their 4-bit grids; s = (1, 1/7) makes X [7, 7] and W [7, 1/7], which becomes [7, 0]."""
    reader = basis(2, [edge("n", 0, 2)], [edge("a.weight", 1, 2)])
    given = site(reader, {"a.weight": torch.tensor([[7.0, 1.0]])}, a=rows_of(torch.tensor([[7.0, 1.0]])))
    assert joint_error(given, torch.ones(2)) == 0
    assert joint_error(given, torch.tensor([1.0, 1 / 7])) == pytest.approx((1 / 50) ** 2)


@pytest.mark.parametrize("seed", range(3))
def test_aqas_is_no_worse_than_smoothquant_and_awq(seed):
    """AQAS ≤ min(SmoothQuant, AWQ) by construction; strictly on data with both kinds of channels."""
    given = scaled_site(seed)

    def error(transform):
        assert isinstance(transform, Diagonal)
        return joint_error(given, 1 / transform.d)

    aqas = error(PASSES["aqas"]().transform(given))
    searched = error(PASSES["smoothquant"](alpha="search").transform(given))
    fixed = [error(PASSES["smoothquant"](alpha=alpha).transform(given)) for alpha in (0.0, 0.5, 0.8)]
    awq = [joint_error(given, given.statistics["a.weight"].absmax.value.double() ** a) for a in (0.25, 0.5)]
    assert aqas <= searched <= min(fixed)
    assert aqas < min([joint_error(given, torch.ones(32)), *fixed, *awq])


def test_rescale_by_hand():
    """s = (Σ X² / Σ W²)^¼ over all readers: (2 · 256 / 2)^¼ = 4 and (2 / 32)^¼ = ½; a dead channel stays."""
    X = rows_of(torch.tensor([[16.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    read = basis(3, [edge("n", 0, 3)], [edge("a.weight", 1, 3), edge("b.weight", 1, 3)])
    weights = {
        "a.weight": torch.tensor([[1.0, 4.0, 1.0]]),
        "b.weight": torch.tensor([[0.0, 4.0, 0.0], [-1.0, 0.0, 0.0]]),
    }
    transform = PASSES["rescale"]().transform(site(read, weights, a=X, b=X))
    assert isinstance(transform, Diagonal)
    assert (1 / transform.d).tolist() == pytest.approx([4.0, 0.5, 1.0])


@pytest.mark.parametrize("seed", range(3))
def test_rescale_is_the_least_product_and_undoes_what_was_planted(seed):
    """Behind it a rotation costs rounding less; a diagonal in front of it changes nothing."""
    given = scaled_site(seed)
    X, W = given.statistics["a.weight"].value, given.weights["a.weight"]

    def made(X, W):
        return PASSES["rescale"]().transform(
            replace(given, weights={"a.weight": W}, statistics={"a.weight": rows_of(X)})
        )

    def product(d):
        return float((X * d).square().sum() * (W / d).square().sum())

    def rounding(d):
        rotation = Hadamard(32)
        x, w = rotation(X * d), rotation(W / d)
        return float((fake_quantize(x, INT4) @ fake_quantize(w, INT4).T - X @ W.T).square().mean())

    d = made(X, W).d.float()
    others = [d * (0.1 * normal(1, 32, other)[0]).exp() for other in range(5)]
    assert product(d) < min(product(other) for other in (*others, torch.ones(32)))
    assert rounding(d) <= 0.7 * rounding(torch.ones(32))
    planted = torch.ones(32).index_fill(0, torch.tensor([3, 17]), 30.0)
    assert torch.allclose(made(X * planted, W / planted).d.float() * planted, d)


def test_scales_come_before_rotations():
    from quantize.passes.ordering import check_order

    order = [PASSES["rotate"](), PASSES["fold_norms"](), PASSES["smoothquant"]()]
    with pytest.raises(
        UsageError,
        match=r"`smoothquant` must not come after `rotate`: .*; a legal order is `fold_norms`, `smoothquant`, `rotate`",
    ):
        check_order(order)
    check_order([order[1], order[2], order[0]])


# --- runtime smooth -----------------------------------------------------------------------------------------------


def test_smooth_scales_by_hand():
    x = torch.tensor([[1.0, -8.0, 2.0], [3.0, 4.0, 0.5]])
    order, s = smooth_scales(x, 2, normalize_tokens=False)
    assert order.tolist() == [1, 0, 2]  # maxima 3, 8, 2
    assert s.tolist() == [8.0, 8.0, 2.0]  # the second group has one channel left


def test_tokens_are_normalized_by_hand():
    x = torch.tensor([[6.0, 8.0], [0.6, 0.8]])  # the same direction; root mean squares √50 and √0.5
    _, s = smooth_scales(x, 1, normalize_tokens=True)
    assert torch.allclose(s, torch.tensor([8.0, 6.0]) / math.sqrt(50))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [128, 100])
def test_runtime_smooth_is_fake_quantization_times_the_weight(symmetric, columns, dtype):
    x, q = normal(9, columns), torch.randint(-8, 8, (5, columns), generator=rng(1), dtype=torch.int8)
    scale, bias = (torch.rand(5, 1, generator=rng(2)) + 0.1).to(dtype), normal(1, 5)[0]
    zero_point = None if symmetric else torch.randint(-8, 8, (5, 1), generator=rng(3), dtype=torch.int8)
    y = runtime_smooth_linear(x, q, scale, zero_point, bias, 4, symmetric, 1.0, 32, True)
    args = ActivationArgs(num_bits=4, symmetric=symmetric, runtime_smooth=RuntimeSmoothArgs(group_size=32))
    expected = fake_quantize(x, args) @ dequantize(q, scale, zero_point).T + bias
    assert torch.allclose(y, expected, rtol=1e-4, atol=1e-4)


def smoothed(group_size=128):
    return ActivationArgs(num_bits=4, runtime_smooth=RuntimeSmoothArgs(group_size=group_size))


def test_a_token_depends_on_its_batch_mates():
    X = normal(256, 1024)
    alone, together = fake_quantize(X[:1], smoothed()), fake_quantize(X[:2], smoothed())[:1]
    assert not torch.equal(alone, together)
    assert torch.equal(fake_quantize(X[:1], INT4), fake_quantize(X[:2], INT4)[:1])  # without, it does not


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (Scheme(weights=WeightArgs(num_bits=4)), "those of this scheme are not; leave it out, or take W4A8 or W4A4"),
        (Scheme(weights=WeightArgs(num_bits=4, group_size=64), activations=INT4), "groups of 64; give --group-size 0"),
    ],
)
def test_runtime_smooth_refuses(scheme, message):
    with pytest.raises(UsageError, match=message):
        PASSES["runtime_smooth"]().check(scheme)


# --- noisy bias ---------------------------------------------------------------------------------------------------


def test_a_shift_is_taken_back_exactly_and_makes_a_bias_where_there_is_none():
    W, n, x = normal(3, 4), torch.tensor([0.5, -1.0, 2.0, 0.0]), normal(5, 4, 7)
    input_transform = InputTransform((Hadamard(4), Shift(n)))
    folded = input_transform.fold_into_weight(W)
    for bias in (None, torch.tensor([1.0, 2.0, 3.0])):
        made = input_transform.bias(folded, bias)
        expected = x @ W.T + (0 if bias is None else bias)
        assert torch.allclose(input_transform.transform(x) @ folded.T + made, expected, atol=1e-5)
    assert InputTransform((Hadamard(4),)).bias(folded, None) is None


def noisy_place(X, **arguments):
    return place(None, X.shape[1], rows_of(X)), PASSES["noisy_bias"](**arguments)


def test_noise_is_kept_only_where_it_helps():
    """Inputs that all lie just above the midpoint of two levels gain; those on the levels cannot."""
    columns = torch.full((512, 16), 0.05)
    columns[:, 0] = 0.7  # step 0.1: everything else lies half a step from its two levels
    given, handler = noisy_place(columns)
    found = handler.input_transform(given)
    assert found.has_shift
    assert input_error(given, columns, found) < input_error(given, columns, given.input_transform)
    given, handler = noisy_place(torch.full((512, 16), 0.7))
    assert handler.input_transform(given) == given.input_transform
    given, handler = noisy_place(columns, amplitude=0.0)
    assert handler.input_transform(given) == given.input_transform


def test_noise_that_helps_only_where_it_was_searched_is_not_kept():
    X = torch.full((512, 16), 0.7)
    X[::2, 1:] = 0.05  # the half on which it is searched gains, the other lies on its levels
    given = place(None, 16, Rows(value=X))
    shift = Shift(torch.linspace(-0.05, 0.05, 16))
    assert input_error(given, X[1::2], given.input_transform.append(shift)) > input_error(
        given, X[1::2], given.input_transform
    )
    assert PASSES["noisy_bias"]().input_transform(given) == given.input_transform


def test_a_constant_shift_is_searched_on_its_own():
    X = torch.full((512, 16), 0.05)
    X[:, 0] = 0.7
    given, handler = noisy_place(X, amplitude=0.5, mean_shift=True)
    n = handler.input_transform(given).online[-1].n
    assert abs(float(n.mean())) > 0.01


def test_activation_clip_by_hand():
    """A channel of 7 and 799 of 0.4: at a step of r ≤ 0.8 they cost 49 (1 - r)² + 799 (r - 0.4)², least at r = 0.45."""
    X = torch.full((8, 800), 0.4)
    X[:, 0] = 7.0
    given = replace(place(None, 800, rows_of(X)), weight=torch.eye(800))
    assert PASSES["activation_clip"]().input_transform(given).activations.clip_ratio == pytest.approx(0.45)
    exact = place(None, 4, rows_of(torch.tensor([[7.0, -3.0, 1.0, 0.0]])))
    assert PASSES["activation_clip"]().input_transform(exact).activations.clip_ratio == 1.0


# --- rotations ----------------------------------------------------------------------------------------------------


def test_blocks_of_a_rotation():
    rotate = PASSES["rotate"](block_size=4)
    residual = basis(16, [edge("e", 1, 16)], [edge("q.weight", 1, 16)])
    assert rotate.transform(site(residual, {})).size == 4
    assert rotate.input_transform(place(None, 12)).online[0].settings() == Hadamard(4).settings()
    heads = basis(16, [edge("v", 0, 16)], [edge("o.weight", 1, 16)], heads=2)
    assert rotate.input_transform(place(heads, 16)).online == ()  # within heads of 8 the weights rotate blocks of four


def test_adaptive_rotation_by_the_papers_criterion():
    """J < 1 takes the Hadamard matrix, J ≥ 1 the dual rotation."""
    mild, wild = normal(64, 32) * 0.5, normal(64, 32)
    wild[:, 3] *= 200
    handler = PASSES["adaptive_rotation"](threshold=1.0)
    assert isinstance(handler.input_transform(place(None, 32, rows_of(mild))).online[0], Hadamard)
    assert isinstance(handler.input_transform(place(None, 32, rows_of(wild))).online[0], Dual)


def test_a_dual_rotation_keeps_the_product():
    X = normal(64, 32)
    X[:, 3] *= 200
    given = place(None, 32, rows_of(X))
    input_transform = PASSES["adaptive_rotation"](threshold=1.0).input_transform(given)
    assert torch.allclose(
        input_transform.transform(X) @ input_transform.fold_into_weight(given.weight).T, X @ given.weight.T, atol=1e-2
    )


def test_wush_by_hand():
    """H = diag(16, 1) and G = diag(1, 4), so S = diag(4, 2), and both moments become H₂ S H₂ᵀ = [[3, 1], [1, 3]]."""
    X = torch.tensor([[4.0, 1.0], [4.0, -1.0]])
    W = torch.tensor([[1.0, 2.0], [1.0, -2.0]])
    blocks = Blocks(wush(X, [W[:1], W[1:]], 2, damping=1e-12))
    x, w = blocks(X), blocks.weight(W.double()).float()
    moment = torch.tensor([[3.0, 1.0], [1.0, 3.0]])
    torch.testing.assert_close(x.T @ x / 2, moment)
    torch.testing.assert_close(w.T @ w / 2, moment)
    torch.testing.assert_close(x @ w.T, X @ W.T)


def test_wush_takes_groups_and_leaves_what_is_never_used():
    X = normal(64, 64)
    X[:, :32] = 0
    given = place(None, 64, rows_of(X))
    found = PASSES["wush"]().input_transform(given).online[0].matrices
    assert torch.equal(found[0], torch.eye(32))
    assert not torch.equal(found[1], torch.eye(32))
    assert PASSES["wush"](block_size=24).input_transform(given).online[0].matrices.shape == (8, 8, 8)
    unseen = PASSES["wush"]().input_transform(place(None, 64)).online[0]
    assert torch.equal(unseen.matrices, torch.eye(32).expand(2, 32, 32))


def test_wush_has_one_transform_for_linears_that_share_an_input(one_layer, small_run):
    recipe = {"passes": [{"name": "wush"}], "quantizer": {"name": "rtn"}}
    attention = small_run(one_layer, "W4A4", recipe=recipe).load().model.layers[0].self_attn
    q, k, o = (getattr(attention, f"{name}_proj").online[0].matrices for name in "qko")
    assert torch.equal(q, k)
    assert not torch.equal(q, o)


def test_whole_bases_are_learned_and_heads_are_not():
    learned, X = PASSES["learned_rotation"](steps=3), rows_of(normal(64, 16))
    whole = basis(16, [edge("e", 1, 16)], [edge("a.weight", 1, 16)], AllowedTransforms.CENTRED_ORTHOGONAL)
    T = learned.transform(site(whole, {}, a=X)).apply(torch.eye(16, dtype=torch.float64))
    assert torch.allclose(T @ T.T, torch.eye(16, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(T.sum(0), torch.ones(16, dtype=torch.float64), atol=1e-10)  # a norm takes the mean
    assert isinstance(
        learned.transform(site(replace(whole, allowed=AllowedTransforms.ORTHOGONAL), {}, a=X)), BlockRotation
    )
    assert learned.transform(site(replace(whole, allowed=AllowedTransforms.LINEAR, heads=2), {}, a=X)).size == 8


def test_a_basis_that_runs_through_the_model_is_surveyed(one_layer, program):
    """Inputs of all linears that read the residual stream, as they are behind the passes before: of norm one."""
    plan = make_plan(load_recipe(None, Path("w4a4-folded"), group_size=0), program)
    found = collect_global_statistics(
        open_checkpoint(one_layer), program, plan, [{"input_ids": torch.arange(96).reshape(2, 48)}], RunContext()
    )
    (number,) = found
    assert plan.steps[number].handler.name == "learned_rotation"
    readers = {name.rpartition(".")[0].rpartition(".")[2] for name in found[number]}
    assert {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"} <= readers
    for rows in found[number].values():
        assert len(rows.value) == 96
        assert torch.allclose(rows.value.square().mean(-1), torch.ones(96), atol=1e-2)


# --- statistics ---------------------------------------------------------------------------------------------------


def test_a_sample_does_not_depend_on_the_order_of_the_data():
    X = normal(2000, 8)
    whole, parts = rows_of(X), rows_of(X[1200:])
    parts.merge(rows_of(X[:1200]))
    assert len(whole.value) == Rows.LIMIT
    assert torch.equal(whole.value.sort(dim=0).values, parts.value.sort(dim=0).values)
    assert torch.equal(whole.absmax.value, X.abs().amax(0))
    assert torch.equal(parts.absmax.value, whole.absmax.value)


def test_a_sample_is_spread_over_the_data():
    X = torch.arange(4096.0)[:, None].expand(-1, 4).contiguous()
    assert 1800 < float(rows_of(X).value.mean()) < 2300
    assert isinstance(maxima(1.0).absmax, Absmax)


def test_blocks_follow_the_format():
    """MXFP4 gains from blocks of 32, NVFP4 loses by any rotation, so it must be asked for."""
    mxfp4 = Scheme(weights=WeightArgs(num_bits=4, format="mxfp4", group_size=32))
    nvfp4 = Scheme(weights=WeightArgs(num_bits=4, format="nvfp4", group_size=16))
    read = basis(64, [edge("e", 1, 64)], [edge("q.weight", 1, 64), edge("k.weight", 1, 64)])
    residual = replace(site(read, {}), schemes={"q.weight": mxfp4, "k.weight": W4A4})
    assert PASSES["rotate"]().transform(residual).size == 32  # what suits one reader the other bears
    assert PASSES["rotate"](block_size=0).transform(residual).size == 64
    for name in ("rotate", "learned_rotation", "adaptive_rotation"):
        with pytest.raises(UsageError, match=f"`{name}` makes NVFP4 worse, .*; leave it out, or give it a block_size"):
            PASSES[name]().check(nvfp4)
        PASSES[name](block_size=16).check(nvfp4)
