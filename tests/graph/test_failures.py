"""What fails on calibration data is one true sentence: rows are called too long only where they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quantize import quantize_model
from quantize.errors import QuantizeError
from quantize.pipeline.context import running

TOKENS, POSITIONS = 24, 16
IDS = torch.arange(2 * TOKENS).reshape(2, TOKENS) % 32
TOO_LONG = rf"makes {TOKENS} tokens, and {{}} has {POSITIONS} positions; give shorter rows, .*--seqlen$"


class Model(nn.Module):
    """A linear behind a table of words and what `places` adds to it."""

    def __init__(self, places):
        super().__init__()
        self.words, self.places = nn.Embedding(32, 16), places
        self.linear, self.head = nn.Linear(16, 16), nn.Linear(16, 32)

    def forward(self, ids):
        x = self.words(ids)
        return self.head(self.linear(x + self.places(ids)))


class Counted(nn.Module):
    """A table of positions, of which the first few are left free."""

    def __init__(self, free=0):
        super().__init__()
        self.table, self.free = nn.Embedding(POSITIONS + free, 16), free

    def forward(self, ids):
        return self.table(torch.arange(ids.shape[1], device=ids.device) + self.free)


class Indexed(nn.Module):
    """A buffer that positions index."""

    def __init__(self):
        super().__init__()
        self.register_buffer("held", torch.randn(POSITIONS, 16))

    def forward(self, ids):
        return self.held[torch.arange(ids.shape[1], device=ids.device)]


class Sliced(nn.Module):
    """A parameter of which the first rows are taken."""

    def __init__(self):
        super().__init__()
        self.held = nn.Parameter(torch.randn(1, POSITIONS, 16))

    def forward(self, ids):
        return self.held[:, : ids.shape[1]]


class Kinds(nn.Module):
    """A table that the ids index by their rest, whose rows are too few."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3, 16)

    def forward(self, ids):
        return self.table(ids.remainder(5))


class Factors(nn.Module):
    """A factorization that does not exist."""

    def forward(self, ids):
        return ids[..., None] + torch.linalg.cholesky(-torch.eye(16)).sum()


class TwoInputs(Model):
    """Takes a mask, too, so that rows are taken whole and the graph is not asked for their length."""

    def forward(self, ids, mask):
        return super().forward(ids) * mask[..., None]


class Decides(Model):
    """Is not exported."""

    def forward(self, ids):
        return super().forward(ids) if int(ids.sum()) else ids


@pytest.mark.parametrize("kind", [Model, Decides])
@pytest.mark.parametrize(
    ("places", "sentence"),
    [
        (Counted(), "^a row of the calibration data " + TOO_LONG.format("places.table")),
        (Counted(free=2), "^a row of the calibration data " + TOO_LONG.format("places.table")),
        (Sliced(), "^a row of the calibration data " + TOO_LONG.format("the model")),
        (Kinds(), r"^places.table looks up row 4 of a table of 3; give calibration data whose numbers lie below 3$"),
        (
            Factors(),
            r"^(places does not run on the calibration data|the model does not run on inputs of shape \[2, 24\], "
            r"places, test_failures.py line \d+): linalg.cholesky: .*[^.]; .*, and --verbose shows the whole error$",
        ),
    ],
)
def test_what_fails_is_said(kind, places, sentence, tmp_path):
    with pytest.raises(QuantizeError, match=sentence) as raised:
        quantize_model(kind(places), scheme="W8A8", calibration=IDS, seqlen=TOKENS, output_dir=tmp_path / "out")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("places", "module"), [(Sliced(), "the model"), (Indexed(), "places"), (Counted(), "places.table")]
)
def test_rows_that_are_taken_whole(places, module, tmp_path):
    given = {"ids": IDS, "mask": torch.ones(IDS.shape)}
    with pytest.raises(QuantizeError, match=TOO_LONG.format(module)):
        quantize_model(TwoInputs(places), scheme="W8A8", calibration=given, output_dir=tmp_path / "out")


def test_a_failure_that_is_no_operators_of_the_model():
    with pytest.raises(QuantizeError, match=r"^the run failed at layers\.3: odd; report this"), running("layers.3"):
        raise RuntimeError("odd\nand more")
