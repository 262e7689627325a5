"""The bases that the analysis found are shown as a table."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

LISTS = ("written by", "read by", "why no more")
MOST = 8  # names in a cell; a residual stream has few kinds of writers, however many layers there are


def bases_table(bases: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table with a section for bases alike in every layer: what is allowed, who writes and reads them, why.

    It has two columns, so that no name is broken at 80 characters.
    """
    table = Table("bases", "", box=SIMPLE_HEAD, show_header=False)
    table.columns[0].no_wrap = True
    for (dim, allowed, *lists), count in Counter(as_row(basis) for basis in bases).items():
        table.add_row(f"[bold]{count} {'bases' if count > 1 else 'basis'}", f"[bold]{dim} channels, {allowed}")
        for label, lines in zip(LISTS, lists, strict=True):
            shown = lines[:MOST] + (f"and {len(lines) - MOST} more",) * (len(lines) > MOST)
            table.add_row(label, escape("\n".join(shown))) if lines else None
        table.add_section()
    return table


def as_row(basis: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return a basis with the layers' numbers taken out of all names."""
    heads = basis["heads"]
    dim = f"{basis['dim']}" if heads in (1, basis["dim"]) else f"{heads} × {basis['dim'] // heads}"
    pairs = [f"↔ {name}" for name in basis["paired"]]
    gains = [f"only once `{name}` is folded" for name in basis["after_folding"]]
    lists = (basis["writers"], [*basis["readers"], *pairs], [*basis["pins"], *gains])
    return dim, basis["allowed"].replace("_", " "), *(tuple(dict.fromkeys(map(anonymous, names))) for names in lists)


def anonymous(text: str) -> str:
    """Return `layers.{i}.mlp` for `layers.7.mlp.weight`."""
    return re.sub(r"\.\d+\.", ".{i}.", text).removesuffix(".weight")
