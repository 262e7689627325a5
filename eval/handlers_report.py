"""`benchmarks/handlers.md` from the rows of `make bench-handlers`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
HEAD = """# Outlier handlers, side by side

`make bench-handlers` wrote this file and `handlers.json`. Per-channel weights, per-token activations, GPTQ unless it
says otherwise. The planted twins compute the same function as the model itself: *channel* has two channels of every
norm gain (MiniLM: of every value basis) × 30, *token_sparse* the two most peaked channels of every gated input
(MiniLM: value basis) × 30, *two_spike* the two largest channels of one token of these at the same height of 100 root
mean squares. A cell of books-llama is the increase of the loss in nats per token on 16 windows of 256 unseen tokens,
(KL to the float model), and κ, the kurtosis of what the quantizers see; one of MiniLM the part of the float model's
Spearman correlation on STS 2016 answer-answer that is left, (1 - the cosine of its embeddings with the float model's),
and κ. *Cost* is what runs online, in multiply-adds for each token, as a part of those of the linears. **Bold** is the
closest to the float model in a column (KL, cosine); the seed moves books-llama by about 0.002 nats and MiniLM's
correlation by about 1 %: 254 pairs decide less than the cosine does.
"""


CLAIMS = """
## What papers say, and what holds here

Synthetic data from seeded generators (`python -m quantize.eval.claims`); a claim is *left ≤ factor · right*, and
`tests/test_claims.py` holds each to what stands here.

| claim | paper | left | right | factor | holds |
|---|---|---|---|---|---|"""


def markdown(rows: Sequence[Row], claims: Iterable[Row]) -> str:
    """One table for each scheme and model, and one of the claims."""
    parts = [HEAD]
    for scheme, model in dict.fromkeys((row["scheme"], row["model"]) for row in rows):
        chosen = [row for row in rows if (row["scheme"], row["model"]) == (scheme, model)]
        parts.append(f"\n## {model}, {scheme}\n")
        parts += table(chosen)
    parts.append(CLAIMS)
    parts += ["| " + " | ".join(map(figure, claim.values())) + " |" for claim in claims]
    return "\n".join(parts) + "\n"


def figure(value: object) -> str:
    """A value of a claim as it is shown."""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[Row]) -> list[str]:
    """A row for each handler, a column for each twin."""
    twins, handlers = list(dict.fromkeys(row["twin"] for row in rows)), dict.fromkeys(row["handler"] for row in rows)
    at = {(row["handler"], row["twin"]): row for row in rows}
    best = {twin: best_of(row for row in rows if row["twin"] == twin) for twin in twins}
    before = {row["twin"]: row["kurtosis_before"] for row in rows}
    heads = [f"{twin} (float: κ {before[twin]:.0f})" for twin in twins]
    lines = ["| handler | cost | " + " | ".join(heads) + " |", "|---" * (len(twins) + 2) + "|"]
    for handler in handlers:
        found = [at.get((handler, twin)) for twin in twins]
        cost = next(row["cost"] for row in found if row)
        cells = [cell(row, row is best[twin]) if row else "" for row, twin in zip(found, twins, strict=True)]
        lines.append(f"| {handler} | {cost:.1%} | " + " | ".join(cells) + " |")
    return lines


def best_of(rows: Iterable[Row]) -> Row:
    """The row closest to the float model."""
    return min(rows, key=lambda row: row["kl"] if "kl" in row else row["distance"])


def cell(row: Row, best: bool) -> str:
    """What one handler does on one model."""
    text = (
        f"{row['increase']:+.4f} ({row['kl']:.4f})" if "kl" in row else f"{row['retained']:.1%} ({row['distance']:.4f})"
    )
    return f"{f'**{text}**' if best else text} κ {row['kurtosis']:.1f}"
