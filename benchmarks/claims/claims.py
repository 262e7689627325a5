"""`python -m benchmarks.claims.claims` prints which claims of papers hold here, and which are not measured.

These are measurements, not features: a claim that does not hold here stays in the table, marked as such.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.claims import format_claims, handler_claims, kv_cache_claims, model_claims, wush_claims

CLAIMS = (
    *handler_claims.CLAIMS,
    *wush_claims.CLAIMS,
    *format_claims.CLAIMS,
    *model_claims.CLAIMS,
    *kv_cache_claims.CLAIMS,
)


def rows() -> Iterator[dict[str, str | float | bool]]:
    """Yield every claim with its figures."""
    yield from (claim.row() for claim in CLAIMS)
    yield from (claim.row() for claim in model_claims.NOT_MEASURED)


def main() -> None:
    """Print the claims with their figures."""
    table = Table("claim", "paper", "left", "right", "factor", "holds", box=SIMPLE_HEAD, pad_edge=False)
    for row in rows():
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
