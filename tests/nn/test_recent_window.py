"""A query reads the last keys and values in floating point, and those before them rounded."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from quantize.nn.attention import attend_with_quantized_cache
from quantize.nn.kv_cache import attend, read_heads, rotate_heads
from quantize.scheme.scheme import KVCacheArgs

T, LENGTH = 6, 2
ARGS = KVCacheArgs(num_bits=4, residual_length=LENGTH)
COLUMNS = torch.arange(T)
CAUSAL = COLUMNS[:, None] >= COLUMNS
MASKS = {
    "none": None,
    "causal": CAUSAL[None, None],
    "sliding": (CAUSAL & (COLUMNS[:, None] - 4 < COLUMNS))[None, None],
    "padded on the left": torch.stack([CAUSAL, CAUSAL & (COLUMNS > 1)])[:, None],
    "places that are not filled yet": (CAUSAL & (COLUMNS < 4))[None, None],
    "added to the scores": torch.where(CAUSAL, 0.5 * COLUMNS, -math.inf)[None, None],
}


def heads():
    return torch.randn(3, 2, 2, T, 8, generator=torch.Generator().manual_seed(0))


def one_by_one(query, key, value, mask):
    """Attention of each query on its own rows, as a cache that packs what leaves its window would hold them."""
    rounded = read_heads(query, key, value, mask, False, ARGS.model_copy(update={"residual_length": 0}))
    turned = rotate_heads(query, key, value)
    given = torch.zeros(1, 1, T, T).masked_fill(~CAUSAL, -math.inf) if mask is None else mask
    given = torch.zeros(given.shape).masked_fill(~given, -math.inf) if given.dtype == torch.bool else given
    found = torch.full(query.shape, math.nan)
    for b in range(len(query)):
        for i in range(T):
            row = given[b % len(given), 0, i]
            if not (seen := (row > -math.inf).nonzero().flatten().tolist()):
                continue
            sources = [(turned if j > seen[-1] - LENGTH else rounded) for j in seen]
            k, v = (torch.stack([x[n][b, :, j] for j, x in zip(seen, sources, strict=True)], 1) for n in (1, 2))
            scores = (turned[0][b, :, i, None] @ k.mT)[:, 0] / 8**0.5 + row[seen]
            found[b, :, i] = (scores.softmax(-1)[:, None] @ v)[:, 0]
    return found


@pytest.mark.parametrize("name", MASKS)
def test_each_query_has_its_own_window(name):
    """In the graph's operator and in transformers' interface; a query that sees nothing has no answer."""
    query, key, value = heads()
    mask = MASKS[name]
    expected = one_by_one(query, key, value, mask)
    known = ~expected.isnan()
    change = functools.partial(read_heads, args=ARGS)
    found = attend(scaled_dot_product_attention, change, query, key, value, mask, 0.0, mask is None)
    torch.testing.assert_close(found[known], expected[known], rtol=1e-4, atol=1e-5)
    module = SimpleNamespace(is_causal=True)
    found, _ = attend_with_quantized_cache(module, query, key, value, mask, kv_cache=ARGS)
    torch.testing.assert_close(found.transpose(1, 2)[known], expected[known], rtol=1e-4, atol=1e-5)
    plain, _ = attend_with_quantized_cache(module, query, key, value, mask, kv_cache=KVCacheArgs(num_bits=4))
    assert float((plain.transpose(1, 2) - expected)[known].abs().max()) > 0.01  # so the window is seen


def test_a_bias_of_positions_goes_along():
    """As T5's, which transformers adds to the scores behind the interface."""
    query, key, value = heads()
    bias = torch.randn(1, 2, T, T, generator=torch.Generator().manual_seed(1))
    module = SimpleNamespace(is_causal=True)
    found, _ = attend_with_quantized_cache(module, query, key, value, None, kv_cache=ARGS, position_bias=bias)
    mask = bias.masked_fill(~CAUSAL, torch.finfo(bias.dtype).min)
    expected, _ = attend_with_quantized_cache(module, query, key, value, mask, kv_cache=ARGS)
    torch.testing.assert_close(found, expected)
