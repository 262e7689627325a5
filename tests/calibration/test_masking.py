"""Masked-diffusion language models are calibrated on masked text, and scored on what is masked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from quantize.calibration.data import Samples
from quantize.calibration.masking import mask_samples, masked_places
from quantize.errors import UsageError
from quantize.eval.masked import PARTS, score_masked

MASK = 500
RTN = {"passes": [], "quantizer": {"name": "rtn"}}


def rows(count=200, length=50):
    ids = torch.randint(0, 400, (count, length), generator=torch.Generator().manual_seed(0))
    return Samples(tuple({"input_ids": row} for row in ids), "")


def test_a_tenth_to_nine_tenths_of_each_row_are_masked():
    given = rows()
    found, again = (mask_samples(given, MASK, 512, seed=0) for _ in range(2))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(found.rows, again.rows, strict=True))
    masked = torch.stack([row["input_ids"] == MASK for row in found.rows])
    for before, after, hidden in zip(given.rows, found.rows, masked, strict=True):
        assert torch.equal(before["input_ids"][~hidden], after["input_ids"][~hidden])
    parts = masked.float().mean(1)
    assert 0.1 <= float(parts.min()) < 0.15
    assert 0.85 < float(parts.max()) <= 0.9
    assert abs(float(parts.mean()) - 0.5) < 0.03
    assert abs(float(masked.float().mean(0).std())) < 0.06  # every place alike
    assert not torch.equal(masked[0], masked[1])


def test_one_token_at_least_is_masked():
    assert int(masked_places(3, 0.1, np.random.default_rng(0)).sum()) == 1


def test_what_cannot_be_masked_is_one_sentence(small_run, one_layer):
    with pytest.raises(UsageError, match="mask_id 512 is no token; give an id from 0 to 511"):
        small_run(one_layer, "W8A8", recipe=RTN | {"calibration": {"mask_id": 512}})
    several = Samples(({"ids": torch.arange(4), "t": torch.tensor(3)},), "", whole=True)
    with pytest.raises(UsageError, match="masks rows of token ids alone; leave it out and give rows that are masked"):
        mask_samples(several, MASK, 512, 0)


def test_a_run_calibrates_on_masked_rows_and_eval_scores_what_is_masked(small_run, variant, stories_dev, cli):
    model = variant(is_causal=False)
    recipe = {"passes": [{"name": "smoothquant"}], "quantizer": {"name": "gptq"}}
    plain = small_run(model, "W4A8", output="plain", recipe=recipe)
    artifact = small_run(model, "W4A8", recipe=recipe | {"calibration": {"mask_id": MASK}})
    assert artifact.manifest["files"] != plain.manifest["files"]
    arguments = ["eval", artifact.directory, "--text", stories_dev, "--nsamples", 2, "--seqlen", 40, "--json"]
    shown = cli(*arguments)
    assert shown.code == 0, shown.err
    assert '"tokens": 200' in shown.out  # two windows of 40, of which 0.1 to 0.9 are masked: 2 (4 + 12 + 20 + 28 + 36)
    assert cli(*arguments, "--mask-id", 512).code == 2


class Knows(nn.Module):
    """Knows which token stands where, and returns it for masked tokens alone."""

    def __init__(self, ids):
        super().__init__()
        self.ids = ids

    def forward(self, input_ids):
        logits = torch.zeros(*input_ids.shape, 512)
        logits.scatter_(2, torch.where(input_ids == MASK, self.ids, 0)[..., None], 50.0)
        return type("Output", (), {"logits": logits})


def test_the_score_is_of_the_masked_tokens_themselves():
    ids = torch.randint(1, 400, (3, 20), generator=torch.Generator().manual_seed(0))
    found = score_masked(Knows(ids), [ids], MASK, against=Knows(ids))
    assert found.tokens == 3 * sum(round(20 * part) for part in PARTS)
    assert found.loss < 1e-6
    assert (found.kl, found.top1) == (0, 1)
    assert score_masked(Knows(ids.flip(1)), [ids], MASK).loss > 10


def test_a_bidirectional_decoder_is_a_model_of_transformers(variant):
    model = AutoModelForCausalLM.from_pretrained(variant(is_causal=False), dtype=torch.float32).eval()
    ids = torch.arange(3, 19)[None]
    other = ids.clone()
    other[0, -1] = 99
    with torch.no_grad():
        assert not torch.equal(model(ids).logits[0, 0], model(other).logits[0, 0])
