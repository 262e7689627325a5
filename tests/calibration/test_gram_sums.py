"""Sums of products in bfloat16, of which only what the sum so far does not forecast is rounded."""

import torch

from quantize.calibration.statistics import Gram
from quantize.pipeline.rng import derived_generator

ROWS, K = 512, 96


def batches(count=8):
    """Activations with a mean, channels of very unequal size, and one that is silent now and then, or always."""
    generator = derived_generator(0)
    mean, size = torch.randn(K, generator=generator), torch.randn(K, generator=generator).exp()
    x = [(torch.randn(ROWS, K, generator=generator) + mean) * size for _ in range(count)]
    for number, batch in enumerate(x):
        batch[:, 0] *= number % 2
        batch[:, 1] = 0
    return [batch.bfloat16() for batch in x]


def summed(parts, dtype=torch.bfloat16):
    gram = Gram()
    for x in parts:
        gram.update(x, dtype=dtype)
    return gram.value


def error(found, x):
    """The largest, as a part of the diagonal."""
    exact = x.double().T @ x.double()
    size = exact.diagonal().sqrt().clamp(min=1e-9)
    return float(((found - exact).abs() / size / size[:, None]).max())


def test_a_forecast_sum_is_far_nearer_than_a_rounded_one():
    x = batches()
    found, rounded = summed(x), sum((part.T @ part).float() for part in x)
    assert 1e-7 < error(found, torch.cat(x)) < 2e-4 < 1e-3 < error(rounded, torch.cat(x))
    assert torch.equal(found, found.T)
    assert not found[1].any()  # a channel that is always silent stays known as such


def test_where_all_is_foreseen_nothing_is_rounded():
    """What a forecast leaves of whole numbers is small whole numbers, which bfloat16 holds as they are."""
    x = torch.randint(-8, 8, (ROWS, K), generator=derived_generator(0)).bfloat16()
    exact = 8 * (x.float().T @ x.float())
    assert not torch.equal(8 * (x.T @ x).float(), exact)
    assert torch.equal(summed([x] * 8), exact)


def test_a_drift_is_summed_beside():
    x = batches()
    gram = Gram()
    for part in x:
        gram.update(part, 1.25 * part.float(), torch.bfloat16)
    assert gram.value is not None and gram.drift is not None
    assert (gram.drift - 0.25 * gram.value).norm() < 1e-3 * gram.value.norm()


def test_without_bfloat16_sums_are_those_of_float32():
    x = batches()
    assert error(summed(x, torch.float32), torch.cat(x)) < 1e-6
