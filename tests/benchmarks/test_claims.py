"""What papers say: what holds here, and what does not, with its figures."""

import pytest
import torch

from benchmarks.claims import coupled, kv_cache_claims, kvarn, model_claims, oscar, sparsity, variance
from benchmarks.claims.claims import CLAIMS
from benchmarks.claims.codebooks import dint4, error, min_max, nearest, powers, scaled, tlq, uniform
from benchmarks.claims.format_claims import sample
from benchmarks.claims.kv_cache import divergence, positions_undone, rounded
from benchmarks.claims.synthetic import kmeans, sparse_error, top_gates

REFUTED = {
    "RRS, paper's rule ≤ 1.05 rotation (two spikes)": (0.520, 0.0405),
    "noise and shift ≤ a zero point": (0.1276, 0.0455),
    "dual rotation ≤ Hadamard (one 200 × channel)": (0.00963, 0.00347),
    "TLQ < clipped uniform (Gaussian, 3 bits)": (0.0472, 0.0402),
    "POST < powers of two (Gaussian, 3 bits)": (0.0681, 0.0467),
    "POST < uniform (Gaussian, 3 bits)": (0.0681, 0.0402),
    "WUSH ≤ 0.9 balanced channels and a Hadamard matrix (MXFP4)": (0.0148, 0.0149),
    "CQ: 8 channels, 8 bits ≤ ½ of 1 channel, 1 bit (independent)": (0.340, 0.361),
    "Hadamard blocks help NVFP4 (Laplace)": (0.00909, 0.00863),
    "REAP < pruning experts by frequency": (0.671, 0.198),
    "Ranger: results clamped ≤ 1/10 (the same)": (2.005, 4.054),
    "FitAct's bounds by channel < one for each linear (the same, not trained)": (0.0932, 0.01014),
    "bounds in front of linears ≤ ½ (the same)": (4.054, 4.054),
    "channels by R-Sparse's score < by magnitude (50 %, loss)": (0.0499, 0.0416),
    "TVR's step on a trained model lowers its 4-bit error": (0.01692, 0.01692),
    "TVR's step on a trained model leaves its loss": (5.592, 4.264),
    "OSCAR for each head ≤ 0.9 for each layer (2 bits, KL)": (0.0649, 0.0628),
    "KVarN ≤ 0.9 a Hadamard matrix (K4 V2, KL)": (0.0201, 0.0219),
    "KVarN's scales ≤ 0.9 its tiles without them (K2 V2, KL)": (0.0627, 0.0549),
    "CQ by Fisher's weights ≤ 0.9 by even ones (8c8b, KL)": (0.0649, 0.0677),
}
BY_NAME = {claim.name: claim for claim in CLAIMS}
ON_A_MODEL = {claim.name for claim in (*model_claims.CLAIMS, *kv_cache_claims.CLAIMS)}


def params(names):
    """Return parameters for pytest; what runs a model is slow."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in ON_A_MODEL)) for name in names]


@pytest.mark.parametrize("name", params(claim.name for claim in CLAIMS if claim.holds))
def test_a_claim_holds_by_its_margin(name):
    row = BY_NAME[name].row()
    assert 0 < row["left"] <= row["factor"] * row["right"]
    assert row["holds"]


@pytest.mark.parametrize("name", params(REFUTED))
def test_a_claim_does_not_hold_here(name):
    row = BY_NAME[name].row()
    assert row["left"] > row["factor"] * row["right"]
    assert not row["holds"]
    assert (row["left"], row["right"]) == pytest.approx(REFUTED[name], rel=0.02)


def test_every_refuted_claim_is_in_the_table():
    assert len(BY_NAME) == len(CLAIMS)
    assert REFUTED.keys() == {claim.name for claim in CLAIMS if not claim.holds}


def test_levels_by_hand():
    assert uniform(3).tolist() == pytest.approx([-4 / 3, -1, -2 / 3, -1 / 3, 0, 1 / 3, 2 / 3, 1])
    assert sorted(powers(3, 2.0).tolist()) == [-1, -0.5, -0.25, 0, 0.25, 0.5, 1]
    assert sorted((6 * dint4()).tolist()) == [-7, -6, -5, -4, -3, -2, -1, -0.5, 0, 0.5, 1, 2, 3, 4, 5, 6]


def test_no_codebook_has_more_levels_than_its_bits():
    W = sample("gaussian", rows=2, columns=64)
    for bits in (3, 4):
        books = [*min_max(W, bits), *tlq(W, bits), *scaled(W, uniform(bits)), *scaled(W, powers(bits, 2**0.5))]
        assert {book.shape for book in books} <= {(2, 2**bits), (2, 2**bits - 1)}
        assert all(torch.isfinite(book).all() for book in books)
    assert len(dint4()) == 16


def test_rounding_and_error_by_hand():
    W, levels = torch.tensor([[0.4, -2.0], [3.0, 4.0]]), torch.tensor([[0.0, -1.0], [2.0, 4.0]])
    assert nearest(W, levels).tolist() == [[0.0, -1.0], [2.0, 4.0]]
    worse = levels + 100
    assert error(W, [worse, levels]) == pytest.approx((0.16 + 1 + 1) / (0.16 + 4 + 9 + 16))


def test_tlq_levels_are_even_in_the_logarithm():
    W = torch.tensor([[0.25, 1.0, 4.0, -0.5, -8.0]])
    book = next(tlq(W, 3))[0]  # η = 0.001, quantile 0.98
    steps = (book[:4] + 0.001).log2().diff()
    assert book[0].item() == pytest.approx(0.25)
    assert book[4].item() == pytest.approx(-0.5)
    assert steps.tolist() == pytest.approx([steps[0].item()] * 3, rel=1e-4)


def test_kmeans_finds_separate_clusters():
    rng = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(50, 2, generator=rng) * 0.1 + centre for centre in (0, 10)])
    assert sorted(kmeans(x, 2, rng).mean(dim=1).tolist()) == pytest.approx([0, 10], abs=0.1)


def test_the_two_largest_gates_add_up_to_one():
    gates = top_gates(torch.tensor([[0.0, 1.0, 1.0, -5.0]]))
    assert gates.tolist() == [[0.0, 0.5, 0.5, 0.0]]


def test_the_whole_budget_leaves_no_error():
    assert sparse_error(share=1.0, sparsity=0.0) == pytest.approx(0, abs=1e-9)


def test_a_claim_that_is_not_measured_says_why():
    rows = [claim.row() for claim in model_claims.NOT_MEASURED]
    assert {"2204.07439", "2503.17500", "2502.00840", "2112.13544, 2406.06313"} == {row["paper"] for row in rows}
    assert all(row["left"] == "" and "not measured: " in row["holds"] for row in rows)


def test_sparse_products_by_hand():
    """Channel 0 is kept, |3| · 1 > 2; channel 1 goes through the low-rank matrix."""
    found = sparsity.Sparse(torch.ones(2), 2.0, torch.tensor([[9.0, 0.5]]), 0.5)
    assert found.product(torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0, 7.0]])).tolist() == [[6.5]]


def test_variance_rescaling_by_hand():
    """Mean 1 and standard deviation 2: to a target of 1 it is (W - 1) / 2 + 1, and to 2 it stays."""
    W = torch.tensor([[-1.0, 1.0, 3.0]])
    assert variance.rescaled(W, 1.0).tolist() == [[0.0, 1.0, 2.0]]
    assert variance.rescaled(W, 2.0) is W
    assert [variance.depth(f"model.layers.{n}.mlp.up_proj") for n in (0, 7)] == [1, 8]


def test_rounding_of_a_cache_by_hand():
    """Two bits from 0 to 6 in steps of 2, with zero points; half of the range is 1.5 to 4.5 in steps of 1."""
    row = torch.tensor([[0.0, 2.9, 3.1, 6.0]])
    assert rounded(row, 2).tolist() == [[0, 2, 4, 6]]
    assert rounded(row, 2, clip_ratio=0.5).tolist() == [[1.5, 2.5, 3.5, 4.5]]
    assert rounded(row.T, 2, dim=-2).T.tolist() == [[0, 2, 4, 6]]


def test_kvarn_finds_the_scales_of_tokens_and_channels():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1, 128, 64, generator=rng)
    uneven = x * torch.randn(128, 1, generator=rng).abs().exp() * torch.randn(64, generator=rng).abs().exp()
    balanced = uneven / kvarn.balancing(uneven)
    assert kvarn.imbalance(balanced).item() < 2.5 < 20 < kvarn.imbalance(uneven).item()


def test_weighted_centroids_by_hand():
    """Two clusters; in the first the token of weight 3 pulls the mean to (0 + 3 · 1) / 4."""
    x = torch.tensor([[[0.0], [1.0], [10.0], [10.0]]])
    found = coupled.weighted_kmeans(x, torch.tensor([[1.0, 3.0, 2.0, 2.0]]), 2, rounds=20)
    assert sorted(found.flatten().tolist()) == [0.75, 10.0]


@pytest.mark.slow
def test_what_a_cache_goes_through_leaves_the_model_as_it_is(monkeypatch):
    """OSCAR's and KVarN's transforms and the rotary embedding undone, with so many bits that nothing is rounded."""
    monkeypatch.setattr(oscar, "CLIPPED", (1.0, 1.0))
    assert divergence(oscar.oscar(16)) < 1e-4 > divergence(kvarn.kvarn((16, 16)))
    x = torch.randn(1, 2, 256, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(positions_undone(positions_undone(x), sign=1), x)
    assert float((positions_undone(x) - x).abs().max()) > 1
    rows = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    every = coupled.in_groups(rows.transpose(0, 1).flatten(1, 2), 4)
    assert torch.equal(coupled.replaced(rows, every), rows)  # each group is its own centroid
