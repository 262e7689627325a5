"""Operands of the kernels: layouts, their inverses, sums."""

import pytest
import torch

from quantize.kernels.packed import (
    BLOCK,
    halves,
    pack_activations,
    pack_nibbles,
    pack_pairs,
    unpack_nibbles,
    unpack_pairs,
)


def all_pairs():
    """Every pair of 4-bit integers as the columns 0 and 64 of a block, int8 [256, 128]."""
    q = torch.zeros(256, BLOCK, dtype=torch.int8)
    q[:, [0, 64]] = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)
    return q


def integers(*shape, seed=0):
    return torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def test_where_nibbles_lie():
    q = torch.zeros(1, 130, dtype=torch.int8)
    q[0, 1], q[0, 65], q[0, 129] = -8, 7, 3
    packed = pack_nibbles(q)
    assert packed.shape == (1, 128)
    assert packed[0, [0, 1, 65]].tolist() == [8, 7 * 16, 3 + 8]


@pytest.mark.parametrize("columns", [1, 64, 128, 200, 256])
def test_nibbles_come_back(columns):
    q = integers(3, columns)
    assert torch.equal(unpack_nibbles(pack_nibbles(q), columns), q)


def test_every_pair_comes_back_and_fits_in_a_byte():
    q = all_pairs()
    low, high = halves(q.int())
    assert (16 * low - (high - 7)).aminmax() == (-128, 127)
    assert torch.equal(unpack_pairs(pack_pairs(q)), q)


def test_one_product_of_whole_bytes_is_the_product():
    """Every pair of activations with every pair of weights."""
    a, w = all_pairs(), all_pairs()
    first, second = (half.flatten(1).int() for half in halves(pack_pairs(a)))
    byte = pack_nibbles(w).int()
    raw = second @ byte.T + first @ (byte & 15).T
    low_sum, high_sum = (half.flatten(1).int().sum(1) for half in (halves(a)[0], halves(w)[1]))
    assert (raw % 16 == 0).all()
    assert torch.equal((raw >> 4) - 8 * low_sum[:, None] + 7 * high_sum, a.int() @ w.int().T)


@pytest.mark.parametrize("layout", ["int8", "pair"])
def test_sums_are_those_of_the_integers(layout):
    q = integers(4, 192)
    packed = pack_activations(q, torch.ones(4), torch.zeros(4), layout, group_size=64)
    assert packed.q.shape == (4, 256)
    assert torch.equal(packed.sum, torch.stack([part.int().sum(1) for part in q.split(64, dim=1)], dim=1).int())
    assert packed.low_sum.tolist() == [int(row[:64].sum() + row[128:192].sum()) for row in q]
