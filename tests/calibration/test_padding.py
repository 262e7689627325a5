"""Rows with several tensors lose their padding, so that it counts in no statistic."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from quantize.calibration.padding import without_padding

LENGTHS = (9, 6, 12, 7)
RECIPE = {"passes": [{"name": "smoothquant"}], "quantizer": {"name": "gptq"}}


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    return BertForMaskedLM(config).eval()


def sentences():
    """Rows as a tokenizer returns them for pairs of sentences."""
    rng = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(1, 64, (n,), generator=rng), "token_type_ids": (torch.arange(n) > n // 2).long()}
        for n in LENGTHS
    ]


def padded(rows):
    """The same in one tensor each, padded behind with a token of its own, and with a mask."""
    batch = {
        name: torch.full((len(rows), max(LENGTHS)), pad) for name, pad in (("input_ids", 63), ("token_type_ids", 1))
    }
    batch["attention_mask"] = torch.zeros(len(rows), max(LENGTHS), dtype=torch.long)
    for n, row in enumerate(rows):
        length = len(row["input_ids"])
        batch["attention_mask"][n, :length] = 1
        for name, x in row.items():
            batch[name][n, :length] = x
    return batch


def test_what_the_masks_leave_out_is_removed_of_all_that_has_a_number_for_each_token():
    row = {
        "input_ids": torch.tensor([7, 8, 9]), "attention_mask": torch.tensor([0, 1, 1]),
        "inputs_embeds": torch.eye(3), "pixel_values": torch.zeros(3, 3),
        "decoder_input_ids": torch.tensor([4, 5, 6]), "decoder_attention_mask": torch.tensor([True, False, False]),
    }  # fmt: skip
    found = without_padding(row)
    assert {name: x.tolist() for name, x in found.items()} == {
        "input_ids": [8, 9], "attention_mask": [1, 1], "inputs_embeds": torch.eye(3)[1:].tolist(),
        "pixel_values": torch.zeros(3, 3).tolist(), "decoder_input_ids": [4], "decoder_attention_mask": [True],
    }  # fmt: skip


@pytest.mark.parametrize("mask", [torch.zeros(3), torch.ones(1, 3, 3)])
def test_a_mask_that_is_no_padding_stays(mask):
    row = {"input_ids": torch.tensor([7, 8, 9]), "attention_mask": mask}
    assert without_padding(row) == row


def test_statistics_of_rows_of_several_tensors_are_the_same_with_and_without_padding(small_run):
    first = small_run(bert(), "W4A8", output="a", calibration=padded(sentences()), recipe=RECIPE, nsamples=4)
    second = small_run(bert(), "W4A8", output="b", calibration=sentences(), recipe=RECIPE, nsamples=4)
    assert first.manifest["files"] == second.manifest["files"]
    assert first.manifest["calibration"] == second.manifest["calibration"]
