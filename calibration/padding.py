"""Rows that are padded to one length lose what their mask leaves out, so that a padded token counts in no statistic."""

from __future__ import annotations

from torch import Tensor

from quantize.calibration.data import Row
from quantize.calibration.records import MASK

DECODER, EMBEDDED = "decoder_", "inputs_embeds"


def without_padding(row: Row) -> dict[str, Tensor]:
    """Return a row, in tensors without a batch axis, without the places that its masks leave out.

    `attention_mask` [T] goes with everything that has one number for each of the T tokens (`input_ids`,
    `token_type_ids`, `position_ids`) and with embeddings [T, K]; `decoder_attention_mask` goes with what is called
    `decoder_…`. A mask of other shapes is no padding and stays, and so does a row of nothing else.
    """
    found = dict(row)
    for prefix in ("", DECODER):
        mask = row.get(prefix + MASK)
        if mask is None or mask.dim() != 1 or not bool((mask != 0).any()):
            continue
        for name, x in row.items():
            per_token = x.dim() == 1 or name == prefix + EMBEDDED
            if per_token and name.startswith(DECODER) == bool(prefix) and len(x) == len(mask):
                found[name] = x[mask != 0]
    return found
