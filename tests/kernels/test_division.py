"""Division by a number that many are divided by, in Triton's interpreter."""

import pytest
import torch
import triton
import triton.language as tl

from quantize.kernels.activation_tile import divided


@triton.jit
def divide(x, divisor, y, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(y + at, divided(tl.load(x + at), tl.load(divisor + tl.arange(0, ROWS))[:, None]))


@pytest.mark.parametrize("exponent", [-126, -100, -3, 0, 5, 90, 127])
def test_division_is_that_of_ieee(exponent):
    """Divisors with all their bits set, powers of two and random ones; quotients of up to 16 bits, as codes are."""
    rng = torch.Generator().manual_seed(exponent)
    divisor = 2 - torch.rand(256, generator=rng)
    divisor[:3] = torch.tensor([1.0, 2 - 2.0**-23, 1 + 2.0**-23])
    divisor = torch.ldexp(divisor, torch.tensor(exponent))
    x = torch.randn(256, 512, generator=rng) * (255 if exponent < 100 else 0.1) * divisor[:, None]
    y = torch.full_like(x, torch.nan)
    divide[(1,)](x, divisor, y, 256, 512)
    assert torch.equal(y, x / divisor[:, None])
