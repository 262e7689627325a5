"""The kernel that rounds columns in turn, in Triton's interpreter, beside the same in plain torch."""

import pytest
import torch
from helpers.operands import rng

from quantize.kernels import column_rounding, engine
from quantize.quantizers.column_rounding import QParams, round_columns
from quantize.scheme.scheme import WeightArgs


def columns(b, N, symmetric):
    W, scale = torch.randn(b, N, generator=rng(0)), torch.rand(b, N, generator=rng(1)) * 0.1 + 0.2
    zero = None if symmetric else torch.randint(-8, 8, (b, N), generator=rng(2)).float()
    grid = QParams(scale, zero, WeightArgs(num_bits=4, group_size=b, symmetric=symmetric))
    return W, grid, torch.randn(b, b, generator=rng(3)) * 0.1


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("b", "N"), [(3, 5), (128, 70), (200, 65)])
def test_the_same_integers_as_in_torch(b, N, symmetric, monkeypatch):
    W, grid, feedback = columns(b, N, symmetric)
    found = []
    for on_triton in (False, True):
        monkeypatch.setattr(engine, "runs_on_triton", lambda _, answer=on_triton: answer)
        target, reference = W.clone(), W.clone()
        round_columns(target, reference, feedback, grid)
        found.append((target, reference))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-6)


def test_two_columns_by_hand():
    """3.4 becomes 3 with an error of 0.4, half of which moves 1.4 to 1.6 and so to 2."""
    target = torch.tensor([[3.4], [1.4]])
    reference, feedback = target.clone(), torch.tensor([[9.0, 0.5], [9.0, 9.0]])
    column_rounding.launch(target, reference, feedback, torch.ones(2, 1), None, 4)
    assert target.tolist() == [[3.0], [2.0]]
    torch.testing.assert_close(reference, torch.tensor([[0.4], [-0.6]]))


def test_more_columns_than_registers_hold():
    W = torch.zeros(129, 1)
    with pytest.raises(ValueError, match="129 columns are more than 128"):
        column_rounding.launch(W, W.clone(), torch.zeros(129, 129), W + 1, None, 4)
