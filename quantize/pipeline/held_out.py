"""Some rows are held back from calibration, so that a run can be judged by data that it has not seen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from quantize.calibration.data import BATCH_TOKENS, Row, Samples, spread
from quantize.errors import QuantizeError

PART = 16  # one row in so many is held back
PROSE_TOKENS = 1024  # of text that takes the place of rows held back
ENOUGH = 8  # rows of which one can be spared
FEW_DIFFERENT = 100  # token ids; running text has hundreds of different ones in a window


@dataclass(frozen=True)
class HeldOutRows:
    """Rows that a run does not calibrate on.

    Attributes:
        rows: the rows; none if there was nothing to hold back.
        source: where they come from, in words.
        generates: whether the model predicts the next token, so that its loss on them means something.
        whole: whether no row may be cut.
    """

    rows: tuple[Row, ...] = ()
    source: str = "calibration data"
    generates: bool = False
    whole: bool = False

    def batches(self, length: int) -> list[Row]:
        """Return each row as a batch of its own, token ids cut to a length."""
        if self.whole:
            return [{k: x[None] for k, x in row.items()} for row in self.rows]
        return [{k: (x if x.is_floating_point() else x[:length])[None] for k, x in row.items()} for row in self.rows]


def hold_out(samples: Samples, generates: bool, prose: Callable[[], Samples] | None) -> tuple[Samples, HeldOutRows]:
    """Split samples into those to calibrate on and rows held back, evenly spread.

    Of few rows, or of rows that repeat a few tokens, none is held back if other text can take their place.

    Args:
        samples: the calibration data.
        generates: whether the model predicts the next token.
        prose: what reads other text; None if the model has no tokenizer or takes more than token ids.
    """
    count, different = len(samples.rows), different_tokens(samples)
    if prose is not None and (count < ENOUGH or (different is not None and different < FEW_DIFFERENT)):
        with contextlib.suppress(QuantizeError):  # a tokenizer that does not fit the model, say
            return samples, HeldOutRows(unseen(prose(), samples), "bundled prose", generates)
    if count < 3:
        return samples, HeldOutRows()
    number = max(1, min(count // PART, BATCH_TOKENS * count // max(samples.tokens, 1)))
    chosen = sorted({(2 * i + 1) * count // (2 * number) for i in range(number)})
    rest = tuple(row for i, row in enumerate(samples.rows) if i not in chosen)
    held = HeldOutRows(tuple(samples.rows[i] for i in chosen), generates=generates, whole=samples.whole)
    return replace(samples, rows=rest), held


def unseen(other: Samples, samples: Samples) -> tuple[Row, ...]:
    """Return two to four rows of other samples that are not among the samples, or up to `PROSE_TOKENS` of them."""
    seen = {tuple(x.tolist()) for row in samples.rows for x in row.values()}
    left = [row for row in other.rows if not any(tuple(x.tolist()) in seen for x in row.values())]
    return tuple(spread(left, min(4, max(2, PROSE_TOKENS * len(other.rows) // other.tokens))))


def different_tokens(samples: Samples) -> int | None:
    """Return how many different token ids the samples have; None for a model that takes no ids."""
    ids = [x for row in samples.rows for x in row.values() if not x.is_floating_point()]
    return len(torch.cat([row.flatten() for row in ids]).unique()) if ids else None
