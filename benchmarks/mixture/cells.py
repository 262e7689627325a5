"""The cells of `make bench-mixture`: how the mixture is quantized, and which of its experts are dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from quantize.eval.demo import PLAIN_ACTIVATIONS, ROUND_TO_NEAREST

FLOAT, DROPPED = "float", "pruned"
SCHEMES = ("W4A16", "W4A8", "W4A4")
PLAIN, DEFAULT, ALL = "plain rounding", "default", "all tokens"
RECIPES = (PLAIN, DEFAULT, ALL)
FEW_WINDOWS = 4
SCARCE = tuple(f"{recipe}, {FEW_WINDOWS} windows" for recipe in (DEFAULT, ALL))  # where nearly every expert is rare
REAP, FREQUENCY, RANDOM = "REAP", "frequency", "random"
RATIOS = {"25 %": 0.25, "50 %": 0.5}
RANDOM_SEEDS = (0, 1, 2)
NSAMPLES, SEQLEN = 32, 256  # of the calibration data, the bundled prose
Row = dict[str, Any]


class Cell(NamedTuple):
    """What has one row: a scheme or `DROPPED`, the recipe or what is dropped by what, and the seed."""

    scheme: str
    recipe: str
    seed: int


def cells() -> list[Cell]:
    """Return everything to measure, the float model first; only what is random has several seeds."""
    found = [Cell(FLOAT, "", 0)]
    found += [
        Cell(DROPPED, f"{share}, {by}", seed)
        for share in RATIOS
        for by in (REAP, FREQUENCY, RANDOM)
        for seed in (RANDOM_SEEDS if by == RANDOM else (0,))
    ]
    found += [Cell(scheme, recipe, 0) for scheme in SCHEMES for recipe in RECIPES]
    return found + [Cell(SCHEMES[-1], recipe, 0) for recipe in SCARCE]


def missing(rows: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """Return the cells that have no row."""
    done = {Cell(*(row[name] for name in Cell._fields)) for row in rows}
    return [cell for cell in cells() if cell not in done]


def position(row: Mapping[str, Any]) -> int:
    """Return the sort key of a row."""
    return cells().index(Cell(*(row[name] for name in Cell._fields)))


def changes(cell: Cell) -> dict[str, Any]:
    """Return the changes of the scheme's default recipe."""
    if cell.recipe == PLAIN:
        return ROUND_TO_NEAREST | ({} if cell.scheme == "W4A16" else PLAIN_ACTIVATIONS) | {"nsamples": NSAMPLES}
    nsamples = FEW_WINDOWS if cell.recipe in SCARCE else NSAMPLES
    return {"calibrate_all_experts": cell.recipe.startswith(ALL), "nsamples": nsamples}
