"""The bases that the analysis found are shown as a table."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

MOST = 8  # names in a cell; a residual stream has few kinds of writers, however many layers there are


def bases_table(bases: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table with a row for bases alike in every layer: what is allowed, who writes and reads them, and why."""
    table = Table("bases", "dim", "allowed")
    for name in ("written by", "read by", "why no more"):
        table.add_column(name, overflow="fold", ratio=1)
    rows = Counter(as_row(basis) for basis in bases)
    for (dim, allowed, *columns), count in rows.items():
        cells = [
            "\n".join(lines[:MOST] + (f"and {len(lines) - MOST} more",) * (len(lines) > MOST)) for lines in columns
        ]
        table.add_row(str(count), dim, allowed, *map(escape, cells), end_section=True)
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
