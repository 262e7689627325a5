"""Rotations found from activations: hand-sized numbers, what each promises, and that it helps on rows it never saw."""

import pytest
import torch

from quantize.transforms.adaptive_rotation import adaptive_rotation, choose_rotation, is_better, rms, token_error
from quantize.transforms.block_rotation import BlockRotation, multiply_blocks, reflect
from quantize.transforms.dual_rotation import (
    DualRotation,
    block_size,
    dual_rotation,
    greedy_rotation,
    in_blocks,
    spreading_matrix,
    swapped,
    zigzag,
)
from quantize.transforms.fold import CentredRotation, Diagonal, Rotation
from quantize.transforms.kurtosis import kurtosis
from quantize.transforms.learned_rotation import OBJECTIVES, kurtail, learn_rotation, orthogonal_factor, whip

HALF = 0.5**0.5


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def identity(size):
    return torch.eye(size, dtype=torch.float64)


def signs(size):
    return torch.randint(0, 2, (size,), generator=rng(7)).double() * 2 - 1


def with_outliers(rows, columns, channels, factor):
    """Normal data of which some channels are `factor` times as large."""
    X = torch.randn(rows, columns, generator=rng(1))
    X[:, torch.randperm(columns, generator=rng(2))[:channels]] *= factor
    return X


def planted(rows, columns, generator):
    """Four signed directions, the same in every call, and noise: what a random Hadamard matrix cannot know."""
    directions = torch.tensor([3.0, 2, 1.5, 1])[:, None] * torch.randn(4, columns, generator=rng(9))
    strength = torch.randn(rows, 4, generator=generator).sign() * (1 + torch.randn(rows, 4, generator=generator) / 5)
    return strength @ directions + 0.5 * torch.randn(rows, columns, generator=generator)


# kurtosis


def test_kurtosis_by_hand():
    """0, 0, 0, 4: deviations -1, -1, -1, 3, variance 3, fourth moment 21, κ = 21/9."""
    x = torch.tensor([[0.0, 0, 0, 4], [1, -1, 1, -1], [5, 5, 5, 5]], dtype=torch.float64)
    assert kurtosis(x).tolist() == pytest.approx([7 / 3, 1, 0])
    assert kurtosis(x * 1e-12).tolist() == pytest.approx([7 / 3, 1, 0])


def test_kurtosis_of_known_distributions():
    assert float(kurtosis(torch.rand(200_000, generator=rng()))) == pytest.approx(1.8, abs=0.02)
    assert float(kurtosis(torch.randn(200_000, generator=rng()))) == pytest.approx(3, abs=0.05)


@pytest.mark.parametrize("kind", ["hadamard", "dual"])
def test_a_rotation_flattens(kind):
    X = with_outliers(512, 512, 8, 60)
    rotation = Rotation(signs(512), 512) if kind == "hadamard" else dual_rotation(X[:256], rng())
    assert float(kurtosis(X[256:].flatten())) > 100
    assert float(kurtosis(rotation.apply(X[256:]).flatten())) < 4


# blocks


def test_block_rotation_by_hand():
    swap, turn = [[0.0, 1], [1, 0]], [[0.0, 1], [-1, 0]]
    x = torch.tensor([1.0, 2, 3, 4])
    assert BlockRotation(torch.tensor([swap, turn])).apply(x).tolist() == [2, 1, -4, 3]
    assert BlockRotation(torch.tensor(turn)).apply(x).tolist() == [-2, 1, -4, 3]
    assert BlockRotation(torch.tensor(turn)).invert(x).tolist() == [2, -1, 4, -3]


def test_blocks_that_do_not_cover_the_channels():
    for blocks in (identity(3), identity(2).repeat(3, 1, 1)):
        with pytest.raises(RuntimeError):
            multiply_blocks(torch.ones(4), blocks)


@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_the_reflection_swaps_the_ones_and_the_first_axis(size):
    H = reflect(identity(size))
    assert torch.allclose(H[0], torch.full((size,), size**-0.5, dtype=torch.float64), atol=1e-14)
    assert torch.allclose(H, H.T, atol=1e-14)
    assert torch.allclose(H @ H, identity(size), atol=1e-14)


# dual


def test_zigzag_by_hand():
    """8 7 | 5 6 | 4 3 | 1 2 are dealt to two blocks, whose sums are both 18."""
    peaks = torch.tensor([1.0, 8, 3, 6, 5, 4, 7, 2])
    permutation = zigzag(peaks, 4)
    assert permutation.tolist() == [1, 4, 5, 0, 6, 3, 2, 7]
    assert peaks[permutation].reshape(2, 4).sum(-1).tolist() == [18, 18]


def test_one_greedy_step_by_hand():
    """Whichever of two channels holds the 4, both hold 4/√2 afterwards; what is even already is left alone."""
    X = torch.tensor([[[4.0, 0]], [[0, 4]], [[3, 3]]])
    R = greedy_rotation(X, rng(), steps=1)
    assert torch.allclose((X.double() @ R)[:2], torch.full((2, 1, 2), 4 * HALF, dtype=torch.float64), atol=1e-14)
    assert torch.equal(R[2], identity(2))


@pytest.mark.parametrize("size", [1, 2, 4, 5, 128])
def test_the_spreading_matrix_has_an_even_first_row(size):
    S = spreading_matrix(size, rng())
    assert torch.allclose(S[0], torch.full((size,), size**-0.5, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(S @ S.T, identity(size), atol=1e-12)
    last = swapped(S, torch.tensor([0, size - 1]))
    assert torch.equal(last[0], S)
    assert torch.allclose(last[1, -1], S[0], atol=1e-12)


def test_the_peak_of_no_block_grows():
    X = in_blocks(with_outliers(64, 64, 3, 20), 16)
    R = greedy_rotation(X, rng(), steps=40)
    before, after = X.abs().amax((1, 2)), (X.double() @ R).abs().amax((1, 2))
    assert bool((after <= before * (1 + 1e-6)).all())
    assert float(after.max()) < 0.5 * float(before.max())


def test_dual_rotation_is_the_product_of_its_parts():
    first, second = (torch.linalg.qr(torch.randn(3, 2, 2, generator=rng(i)).double()).Q for i in (1, 2))
    permutation = torch.tensor([3, 0, 5, 1, 4, 2])
    T = torch.block_diag(*first) @ identity(6)[:, permutation] @ torch.block_diag(*second)
    rotation, x = DualRotation(first, permutation, second), torch.randn(4, 6, generator=rng(3)).double()
    assert torch.allclose(rotation.apply(x), x @ T, atol=1e-14)
    assert torch.allclose(rotation.apply_inverse_transpose(x), x @ torch.linalg.inv(T).T, atol=1e-13)
    assert torch.allclose(rotation.invert(x), x @ T.T, atol=1e-14)


@pytest.mark.parametrize(("columns", "size"), [(1, 1), (7, 7), (96, 96), (131, 131), (256, 128), (344, 86), (262, 2)])
def test_dual_rotation_is_orthogonal_and_repeats(columns, size):
    assert block_size(columns) == size
    X = with_outliers(32, columns, 1, 50)
    rotation, again = (dual_rotation(X, rng(4)) for _ in range(2))
    assert rotation.first.shape == rotation.second.shape == (columns // size, size, size)
    assert sorted(rotation.permutation.tolist()) == list(range(columns))
    T = rotation.apply(identity(columns))
    assert torch.allclose(T @ T.T, identity(columns), atol=1e-10)
    assert torch.allclose(rotation.invert(rotation.apply(X.double())), X.double(), atol=1e-10)
    assert torch.equal(T, again.apply(identity(columns)))


@pytest.mark.slow
def test_dual_rotation_against_a_hadamard_matrix():
    """One channel at 200: far better than nothing, better than Hadamard matrices of its blocks, not than one of all."""
    X = with_outliers(1024, 768, 1, 200)
    seen, held_back = X[:768], X[768:]
    dual = dual_rotation(seen, rng()).apply(held_back)
    blocks, whole = (Rotation(signs(768), size).apply(held_back) for size in (128, 768))
    error = [float(token_error(x).mean()) for x in (held_back, blocks, dual, whole)]
    assert error == sorted(error, reverse=True)
    assert error[2] < 0.2 * error[0]
    assert float(dual.abs().max()) < float(blocks.abs().max()) < 0.2 * float(X.abs().max())


# adaptive


def test_the_papers_criterion():
    normal, outliers = with_outliers(64, 256, 0, 1) * 0.5, with_outliers(64, 256, 1, 200)
    assert rms(torch.tensor([[3.0, 4], [0, 0]])) == 2.5
    assert (choose_rotation(normal, 1), choose_rotation(outliers, 1)) == ("hadamard", "dual")
    assert choose_rotation(outliers * 0.01, 1) == "hadamard"  # J is not free of scale


def test_token_error_by_hand():
    """The largest value 7 gives the step 1: 2.25 becomes 2."""
    x = torch.tensor([[7.0, 2.25, 0, -1], [0, 0, 0, 0]])
    assert token_error(x).tolist() == pytest.approx([0.0625 / (49 + 5.0625 + 1), 0])


def test_better_means_clearly_better():
    X, same = with_outliers(64, 64, 1, 100), Diagonal(torch.ones(64))
    assert is_better(Rotation(signs(64), 64), same, X)
    assert not is_better(same, same, X)
    assert not is_better(same, Rotation(signs(64), 64), X)


@pytest.mark.parametrize("scale", [1, 1e3])
def test_without_a_threshold_the_held_back_error_decides(scale):
    """Uniform data are as flat as can be: a Hadamard matrix makes them normal, a greedy search leaves them."""
    normal, flat = torch.randn(256, 128, generator=rng()) * 0.5, torch.rand(256, 128, generator=rng()) - 0.5
    assert isinstance(adaptive_rotation(normal * scale, None, rng()), Rotation)
    assert isinstance(adaptive_rotation(flat * scale, None, rng()), DualRotation)


def test_with_a_threshold_the_criterion_decides():
    X = with_outliers(16, 32, 1, 200)
    assert isinstance(adaptive_rotation(X, 1.0, rng()), DualRotation)
    assert isinstance(adaptive_rotation(X * 1e-3, 1.0, rng()), Rotation)


# learned


def test_objectives_by_hand():
    flat, outlier = torch.tensor([[1.0, -1, 1, -1]]), torch.tensor([[2.0, 0, 0, 0]])
    e = torch.tensor(1.0).exp()
    assert float(whip(flat)) == pytest.approx(float(4 / e))
    assert float(whip(outlier)) == pytest.approx(float(3 + e**-2))
    assert float(whip(torch.cat((flat, outlier)) * 50)) == pytest.approx(float(4 / e + 3 + e**-2) / 2)
    assert float(kurtail(torch.cat((flat, outlier)))) == pytest.approx((0.8**2 + (7 / 3 - 1.8) ** 2) / 2)


def test_an_orthogonal_matrix_is_its_own_factor():
    Q = torch.linalg.qr(torch.randn(6, 6, generator=rng()).double()).Q
    assert torch.allclose(orthogonal_factor(Q), Q, atol=1e-14)
    assert torch.allclose(orthogonal_factor(2 * Q), Q, atol=1e-14)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("objective", ["whip", "kurtosis"])
def test_learning_helps_on_rows_it_never_saw(objective, centred):
    generator = rng()
    X, held_back = planted(1024, 96, generator), planted(512, 96, generator).double()
    start, R = (learn_rotation(X, objective, rng(3), steps, centred=centred) for steps in (0, 80))
    loss = OBJECTIVES[objective]
    assert float(loss(held_back @ R)) < (0.85 if objective == "whip" else 0.2) * float(loss(held_back @ start))
    assert float(token_error(held_back @ R).mean()) < 0.7 * float(token_error(held_back @ start).mean())
    assert torch.allclose(R @ R.T, identity(96), rtol=0, atol=1e-12)
    assert torch.equal(R, learn_rotation(X, objective, rng(3), 80, centred=centred))
    ones = torch.ones(96, dtype=torch.float64)
    assert torch.allclose(R @ ones, ones, rtol=0, atol=1e-12) == centred


@pytest.mark.parametrize(("kind", "centred"), [(Rotation, False), (CentredRotation, True)])
def test_learning_starts_at_a_random_hadamard_matrix(kind, centred):
    start = learn_rotation(torch.ones(1, 24), "whip", rng(3), 0, centred=centred)
    signs = torch.randint(0, 2, (24,), generator=rng(3)).double() * 2 - 1
    assert torch.allclose(start, kind(signs, 24).apply(identity(24)), atol=1e-6)
