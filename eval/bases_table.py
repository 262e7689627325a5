"""The bases that the analysis found are shown as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from quantize.graph.alike_bases import alike_bases

LISTS = ("written by", "read by", "why no more")
MOST = 8  # names in a cell; a residual stream has few kinds of writers, however many layers there are


def bases_table(bases: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table with a section for bases alike in every layer: what is allowed, who writes and reads them, why.

    It has two columns, so that no name is broken at 80 characters.
    """
    table = Table("bases", "", box=SIMPLE_HEAD, show_header=False)
    table.columns[0].no_wrap = True
    for kind in alike_bases(bases):
        found = f"{kind['count']} {'bases' if kind['count'] > 1 else 'basis'}"
        table.add_row(f"[bold]{found}", f"[bold]{kind['channels']} channels, {kind['allowed']}")
        for label, lines in ((label, kind[label.replace(" ", "_")]) for label in LISTS):
            shown = lines[:MOST] + (f"and {len(lines) - MOST} more",) * (len(lines) > MOST)
            table.add_row(label, escape("\n".join(shown))) if lines else None
        table.add_section()
    return table
