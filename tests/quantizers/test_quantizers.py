"""Rounding, against hand-sized numbers and against round to nearest."""

import copy

import pytest
import torch
from helpers.weights import correlated, gram_of, output_error, weights

from quantize.calibration.statistics import Absmax, Gram
from quantize.errors import QuantizeError
from quantize.formats import qtensor
from quantize.quantizers import QUANTIZERS, base, rtn
from quantize.quantizers.base import compute_qparams
from quantize.quantizers.hessian import factor, fill_upper, permute, solve
from quantize.scheme.scheme import WeightArgs

PER_CHANNEL = WeightArgs(num_bits=4)
GROUPED = WeightArgs(num_bits=4, symmetric=False, group_size=16)


def test_rtn_by_hand():
    W = torch.tensor([[7.0, -3.4, 0.6, 0.0], [1.0, -14.0, 3.0, 2.0]])
    result = QUANTIZERS["rtn"]().quantize(W, PER_CHANNEL, None, torch.float32)
    assert result.unpack().tolist() == [[7, -3, 1, 0], [0, -7, 2, 1]]
    assert result.scale.tolist() == [[1.0], [2.0]]


def test_rtn_rounds_few_rows_at_a_time_to_the_same_bytes(monkeypatch):
    """Else what lies between takes three times the memory of the weight."""
    W, seen = weights(40), []
    whole = QUANTIZERS["rtn"]().quantize(W, GROUPED, None, torch.float32)
    monkeypatch.setattr(rtn, "quantize", lambda w, *grid: seen.append(w.numel()) or base.quantize(w, *grid))
    monkeypatch.setattr(qtensor, "L2_ELEMENTS", 7 * 64)
    parts = QUANTIZERS["rtn"]().quantize(W, GROUPED, None, torch.float32)
    assert seen == [7 * 64] * 5 + [5 * 64]
    assert all(torch.equal(x, parts.tensors()[name]) for name, x in whole.tensors().items())


def test_asymmetric_groups_by_hand():
    W = torch.tensor([[0.0, 15.0, -8.0, 7.0]])
    args = WeightArgs(num_bits=4, symmetric=False, group_size=2)
    result = QUANTIZERS["rtn"]().quantize(W, args, None, torch.float32)
    assert (result.unpack().tolist(), result.zero_point.tolist()) == ([[-8, 7, -8, 7]], [[-8, 0]])
    assert torch.equal(result.dequantize(), W)


def test_gptq_two_columns_by_hand():
    """H = [[2, 1], [1, 2]] / rows; the first column's error e moves the second by -e · U01 / U00 = +e · H01 / H11."""
    W = torch.tensor([[0.4, 7.0]])
    gram = Gram(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), 9)
    gptq = QUANTIZERS["gptq"](mse=False, damp=1e-9, act_order=False, sweeps=0)
    result = gptq.quantize(W * 0.99, WeightArgs(num_bits=4), gram, torch.float32)
    # scale 0.99: w0 = 0.4 → 0, error 0.4; w1 = 7 + 0.4 · 1/2 = 7.2 → 7
    assert result.unpack().tolist() == [[0, 7]]
    result = gptq.quantize(
        torch.tensor([[0.4, 3.4, 7.0]]),
        PER_CHANNEL,
        Gram(torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 1.0]]), 9),
        torch.float32,
    )
    assert result.unpack().tolist() == [[0, 4, 7]]  # 3.4 + 0.2 rounds to 4, where round to nearest gives 3


@pytest.mark.parametrize("args", [PER_CHANNEL, GROUPED, WeightArgs(num_bits=8)], ids=["channel", "group", "8-bit"])
def test_gptq_halves_the_held_out_error_of_rtn(args):
    W, X, held_out = weights(), correlated(), correlated(seed=0)[:64] + 0.01
    rtn = QUANTIZERS["rtn"]().quantize(W, args, None, torch.float32)
    gptq = QUANTIZERS["gptq"]().quantize(W, args, gram_of(X), torch.float32)
    assert output_error(W, gptq, held_out) <= 0.5 * output_error(W, rtn, held_out)


@pytest.mark.parametrize("name", ["gptq", "gptaq"])
def test_a_row_is_enough_for_any_number_of_columns(name):
    """The damping for so few rows is over a hundred times the mean diagonal from the start."""
    generator = torch.Generator().manual_seed(0)
    W, X, gram = torch.randn(4, 256, generator=generator), torch.randn(1, 256, generator=generator), Gram()
    gram.update(X, X)
    args = WeightArgs(num_bits=4)
    found = QUANTIZERS[name]().quantize(W, args, gram, torch.float32).dequantize()
    plain = QUANTIZERS["rtn"]().quantize(W, args, None, torch.float32).dequantize()
    assert float((found - W).norm()) < 1.1 * float((plain - W).norm())


@pytest.mark.parametrize("name", ["gptq", "gptaq"])
def test_fewer_rows_than_columns_lose_no_more_than_rtn(name):
    """As behind a pooling: 48 rows of 64 columns say nothing of a quarter of all directions."""
    W, X = weights(), torch.randn(1088, 64, generator=torch.Generator().manual_seed(0))
    gram = Gram()
    gram.update(X[:48], X[:48])
    rtn = QUANTIZERS["rtn"]().quantize(W, PER_CHANNEL, None, torch.float32)
    made = QUANTIZERS[name]().quantize(W, PER_CHANNEL, gram, torch.float32)
    assert output_error(W, made, X[64:]) <= 1.05 * output_error(W, rtn, X[64:])


def test_block_size_does_not_matter():
    W, gram = weights(), gram_of(correlated())
    small, large = (QUANTIZERS["gptq"](block_size=b).quantize(W, GROUPED, gram, torch.float32) for b in (8, 64))
    assert (small.unpack() != large.unpack()).float().mean() < 0.01  # float32 sums in another order


def test_sweeps_never_raise_the_error_they_minimize():
    W, X = weights(), correlated()
    errors = [
        output_error(W, QUANTIZERS["gptq"](sweeps=n).quantize(W, GROUPED, gram_of(X), torch.float32), X)
        for n in (0, 1, 3)
    ]
    assert errors == sorted(errors, reverse=True)


def test_mse_shrinks_a_range_with_one_outlier():
    W = torch.cat([torch.linspace(-1, 1, 63), torch.tensor([2.6])])[None]
    scale, _ = compute_qparams(W, PER_CHANNEL, torch.float32)
    shrunk, _ = compute_qparams(W, PER_CHANNEL, torch.float32, mse=True)
    assert scale.item() == pytest.approx(2.6 / 7)
    assert shrunk.item() < 0.9 * scale.item()


def test_the_longer_side_gets_the_integer_that_has_no_partner():
    """A scale of either sign gives 8 steps to one side and 7 to the other; a positive one has 8 below zero."""
    W = torch.tensor([[8.0, -6.9, 3.0, 1.0], [-8.0, 6.9, -3.0, -1.0], [8.0, -6.9, 3.0, 1.0]]) * 0.99 * 8 / 7
    scale, _ = compute_qparams(W, PER_CHANNEL, torch.float32, mse=True)
    assert scale[0] < 0 < scale[1]
    assert scale[0] == -scale[1]
    torch.testing.assert_close(scale[1], torch.tensor([0.99 * 8 / 7]), atol=0.01, rtol=0)
    q = QUANTIZERS["rtn"](mse=True).quantize(W, PER_CHANNEL, None, torch.float32)
    assert q.unpack().tolist() == [[-8, 7, -3, -1], [-8, 7, -3, -1], [-8, 7, -3, -1]]
    q.check("W")
    eight_bits, _ = compute_qparams(W, WeightArgs(num_bits=8), torch.float32, mse=True)
    assert (eight_bits > 0).all()


def test_scales_of_either_sign_round_a_tenth_nearer():
    """Rows are Gaussian, as rotated weights are; the best positive scale is looked for finely."""
    args, W = WeightArgs(num_bits=4, group_size=128), torch.randn(400, 128, generator=torch.Generator().manual_seed(0))
    found = QUANTIZERS["rtn"](mse=True).quantize(W, args, None, torch.float32)
    error = (found.dequantize() - W).square().sum(1)
    scales = (W.abs().amax(1, keepdim=True) / 7)[..., None] * torch.linspace(0.5, 1, 200)
    tried = (W[:, :, None] / scales).round().clamp(-8, 7) * scales
    least = (tried - W[:, :, None]).square().sum(1).amin(1)
    assert 0.85 < float(error.sum() / least.sum()) < 0.97


def test_importance_decides_what_is_clipped():
    W = torch.cat([torch.linspace(-1, 1, 63), torch.tensor([2.6])])[None]
    importance = torch.ones(64)
    importance[-1] = 1000
    kept, _ = compute_qparams(W, PER_CHANNEL, torch.float32, mse=True, importance=importance)
    assert kept.item() * -8 == pytest.approx(2.6, rel=0.05)


def test_scales_are_rounded_before_they_are_used():
    result = QUANTIZERS["rtn"]().quantize(weights(), PER_CHANNEL, None, torch.bfloat16)
    assert result.scale.dtype == torch.bfloat16
    nearest = QUANTIZERS["rtn"]().quantize(result.dequantize(), PER_CHANNEL, None, torch.bfloat16)
    assert torch.equal(nearest.dequantize(), result.dequantize())


def test_dead_columns_and_singular_inputs():
    X = correlated(tokens=8)  # rank 8 of 64
    X[:, 3] = 0
    result = QUANTIZERS["gptq"]().quantize(weights(), PER_CHANNEL, gram_of(X), torch.float32)
    assert torch.isfinite(result.dequantize()).all()
    assert not result.unpack()[:, 3].any()


def test_gptq_without_data_is_refused():
    with pytest.raises(QuantizeError, match="needs calibration data"):
        QUANTIZERS["gptq"]().quantize(weights(), PER_CHANNEL, None, torch.float32)


@pytest.mark.parametrize("name", ["gptq", "gptaq"])
def test_infinite_activations_are_refused(name):
    gram, X = Gram(), correlated() * float("inf")
    gram.update(X, X)
    with pytest.raises(QuantizeError, match="not positive definite"):
        QUANTIZERS[name]().quantize(weights(), PER_CHANNEL, gram, torch.float32)


@pytest.mark.parametrize("statistic", [Absmax, Gram])
def test_statistics_merge(statistic):
    X = correlated()
    whole, first, second = statistic(), statistic(), statistic()
    whole.update(X)
    first.update(X[:100])
    second.update(X[100:])
    first.merge(second)
    assert (first.value - whole.value).abs().max() <= 1e-5 * whole.value.abs().max()


def drifted(tokens=2048, columns=64, seed=2):
    """The float model's inputs, and the same with an error that earlier layers have left in them."""
    exact = correlated(tokens, columns)
    mix = torch.randn(columns, columns, generator=torch.Generator().manual_seed(0)) / columns**0.5
    noise = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    return exact + 0.3 * exact @ mix + 0.1 * noise * exact.std(), exact


def test_gptaq_makes_up_for_what_earlier_layers_got_wrong():
    """arXiv 2504.02692: on tokens kept back at most 0.8 of GPTQ's error against the float model's output."""
    W, (X, exact) = weights(), drifted()
    gram = Gram()
    gram.update(X[:1024], exact[:1024])

    def error(quantizer):
        W_hat = quantizer.quantize(W, PER_CHANNEL, gram, torch.float32).dequantize()
        return float((X @ W_hat.T - exact @ W.T)[1024:].square().mean())

    gptq = error(QUANTIZERS["gptq"]())
    assert error(QUANTIZERS["gptaq"](alpha=1.0)) < error(QUANTIZERS["gptaq"]()) <= 0.8 * gptq
    assert error(QUANTIZERS["gptaq"](alpha=0.0)) == gptq
    assert error(QUANTIZERS["gptaq"](alpha=1.0, ridge=1.0)) <= 0.8 * gptq


@pytest.mark.parametrize(("ridge", "expected"), [(0.0, 6.0), (1.0, 4.5), (3.0, 3.75)])
def test_the_correction_by_hand(ridge, expected):
    """One column: X' = 2 X, so D = H = 4, and W + W D / (H + ridge H) = 3 + 3 / (1 + ridge), on a grid of its own."""
    gram = Gram(torch.tensor([[4.0]]), 9, torch.tensor([[4.0]]))
    made = QUANTIZERS["gptaq"](alpha=1.0, ridge=ridge, damp=1e-9, mse=False).quantize(
        torch.tensor([[3.0]]), PER_CHANNEL, gram, torch.float32
    )
    assert made.dequantize().item() == pytest.approx(expected)


def test_a_correction_with_a_ridge_solves_its_normal_equations():
    """W + W D (H + ridge · mean)⁻¹ on several panels, whatever the order of the columns; H and its factor stay."""
    W, (X, exact) = weights(4, 300), drifted(2048, 300)
    gram, order = Gram(), torch.randperm(300, generator=torch.Generator().manual_seed(0))
    gram.update(X, exact)
    H, D = gram.value.clone(), gram.drift.double()
    permute(H, order)
    d = factor(H, 0.01, H.device)
    factored, A = H.clone(), gram.value.double()
    A += 1.01 * A.diagonal().mean() * torch.eye(300) + 0.01 * A.diagonal().mean() * torch.eye(300)
    (found,) = QUANTIZERS["gptaq"](alpha=1.0, ridge=1.0).target_weights([W], gram, H, d, order)
    expected = W + torch.linalg.solve(A, (W.double() @ D).T).T
    assert torch.allclose(found.double(), expected, atol=1e-4)
    assert torch.equal(H, factored)


def test_a_ridge_carries_over_to_other_data():
    """Noise in the input shrinks the correction of GPTAQ where calibration had no energy; data that has some pays."""
    W, seen, rng = weights(), correlated(), torch.Generator().manual_seed(3)
    exact = torch.cat([seen, seen.std() * torch.randn(seen.shape, generator=rng)])
    X = exact + 0.1 * seen.std() * torch.randn(exact.shape, generator=rng)
    gram = Gram()
    gram.update(X[:512], exact[:512])

    def error(name, **settings):
        W_hat = QUANTIZERS[name](**settings).quantize(W, PER_CHANNEL, gram, torch.float32).dequantize()
        return float((X @ W_hat.T - exact @ W.T)[512:].square().mean())

    gptq, ridged, whole = error("gptq"), error("gptaq", alpha=1.0, ridge=1.0), error("gptaq", alpha=1.0)
    assert ridged <= 1.05 * gptq
    assert whole >= 2 * gptq


@pytest.mark.parametrize("columns", [1, 200, 600])  # within one panel, and of several that do not divide them
def test_a_hessian_is_factored_where_it_lies(columns):
    X = correlated(2 * columns, columns).double()
    H = (X.T @ X).float()
    given, damped = H.clone(), H.double() + 0.01 * H.diagonal().mean() * torch.eye(columns)
    d = factor(H, 0.01, H.device)
    A = H.double().triu(1) + torch.eye(columns)
    assert torch.equal(H.tril(-1), given.tril(-1))
    assert (A * d @ A.T - damped).abs().max() <= 1e-5 * damped.abs().max()
    M = weights(4, columns)
    assert torch.allclose(solve(H, d, M.clone()).double() @ damped, M.double(), atol=1e-3)
    fill_upper(H)
    assert torch.equal(H.triu(1), given.triu(1))


def test_a_hessian_is_permuted_in_place():
    H, order = gram_of(correlated(64, 300)).value, torch.randperm(300, generator=torch.Generator().manual_seed(0))
    expected = H[order][:, order]
    permute(H, order)
    assert torch.equal(H, expected)


def test_layers_that_share_an_input_are_rounded_as_if_alone():
    W, gram = weights(48), gram_of(correlated())
    gptq = QUANTIZERS["gptq"]()
    alone = [gptq.quantize(part, GROUPED, gram, torch.float32) for part in W.split([32, 16])]
    together = gptq.quantize_weights(W.split([32, 16]), GROUPED, gram, torch.float32)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a.scale, b.scale)
        assert (a.unpack() != b.unpack()).float().mean() < 0.01  # float32 sums in another order


@pytest.mark.parametrize("name", ["rtn", "gptq"])
def test_layers_that_share_an_input_share_the_scale_of_whole_weights(name):
    """An engine that holds them as one weight has one scale for it."""
    args = WeightArgs(num_bits=4, format="nvfp4", group_size=16)
    quantizer, gram, (large, small) = QUANTIZERS[name](), gram_of(correlated()), weights(48).split([32, 16])
    both = quantizer.quantize_weights([large, small / 100], args, copy.deepcopy(gram), torch.float32)
    assert torch.equal(both[0].global_scale, both[1].global_scale)
    alone = quantizer.quantize(small / 100, args, gram, torch.float32)
    errors = [(found.dequantize() - small / 100).norm() for found in (both[1], alone)]
    assert errors[0] < 1.05 * errors[1]  # a small one loses nothing by it


@pytest.mark.parametrize("args", [PER_CHANNEL, GROUPED, WeightArgs(num_bits=8)], ids=["channel", "group", "8-bit"])
def test_ranges_left_out_of_the_search_are_no_better(args, monkeypatch):
    """The same scales as a search through all ranges."""
    W = weights(64, 256) * torch.linspace(-3, 2, 64)[:, None].exp()
    W[::7, 5] *= 30
    found = compute_qparams(W, args, torch.bfloat16, mse=True, importance=torch.linspace(0.1, 3, 256))
    monkeypatch.setattr(base, "clipping_error_bound", lambda x, *rest: torch.zeros(len(x), 1))
    full = compute_qparams(W, args, torch.bfloat16, mse=True, importance=torch.linspace(0.1, 3, 256))
    assert all(torch.equal(*pair) for pair in zip(found, full, strict=True))


def test_grams_with_drift_merge():
    X, exact = drifted()
    whole, parts, rest = Gram(), Gram(), Gram()
    whole.update(X, exact)
    parts.update(X[:100], exact[:100])
    rest.update(X[100:], exact[100:])
    parts.merge(rest)
    assert torch.allclose(parts.drift, whole.drift, rtol=1e-4, atol=1e-3)
    assert torch.allclose(whole.drift, (exact - X).T @ X, rtol=1e-4, atol=1e-3)
