import pytest
import torch

from quantize.kernels.hadamard import hadamard_factors, hadamard_transform, is_paley, prime_power


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 28, 36, 64, 172, 256, 344, 384, 768, 896, 1536, 5632, 11008, 14336])
def test_factors_are_orthogonal_and_flat(n):
    a, b = hadamard_factors(n)
    assert a.shape[0] * b.shape[0] == n
    for factor in (a, b):
        assert torch.allclose(factor @ factor.T, torch.eye(len(factor), dtype=torch.float64), atol=1e-12)
    flatness = float(a.abs().max() * b.abs().max()) * n**0.5
    assert flatness == pytest.approx(1.0) if n != 172 else 1.0 < flatness < 2**0.5  # Hartley's bound


def test_known_matrix_of_order_four():
    a, b = hadamard_factors(4)
    expected = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64) / 2
    assert torch.allclose(torch.kron(a, b), expected)


@pytest.mark.parametrize(("size", "stride", "columns"), [(12, 1, 12), (4, 3, 24), (20, 2, 40), (5, 1, 15)])
def test_transform_equals_the_dense_matrix(size, stride, columns):
    x = torch.randn(3, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = hadamard_factors(size)
    block = torch.kron(torch.kron(a, b), torch.eye(stride, dtype=torch.float64))
    dense = torch.block_diag(*[block] * (columns // len(block)))
    assert torch.allclose(hadamard_transform(x, size, stride), x @ dense, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_no_rows_stay_no_rows(stride):
    assert hadamard_transform(torch.empty(2, 0, 24), 12, stride).shape == (2, 0, 24)


def test_which_orders_paley_gives():
    assert [m for m in range(4, 120, 4) if not is_paley(m)] == [16, 40, 56, 64, 88, 92, 96, 112, 116]
    assert prime_power(343) == (7, 3)
    assert prime_power(45) is None
