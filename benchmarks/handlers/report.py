"""The rows of `make bench-handlers` become `benchmarks/results/handlers.md`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from benchmarks.handlers.handlers import HANDLERS, WHOLE

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


LEFT_OUT = """
## What each handler adds to the whole recipe, {scheme}

The whole recipe is the default one, and at W4A4 `w4a4-folded`, which was the default when this was measured.

How much further from the float model (KL, 1 - cosine) the recipe is without it: the mean over seeds, and the least and
the largest of them. What is negative in every seed is **bold**: there the handler may make the model worse, though of
handlers that do nothing two seeds say so in every fourth cell. The last column is the mean of all cells and seeds, and
its standard error.
"""


CLAIMS = """
## What papers say, and what holds here

Synthetic data from seeded generators, and from *FT-ClipAct* on books-llama-6m (`python -m benchmarks.claims.claims`); a
claim is *left ≤ factor · right*, and `tests/benchmarks/test_claims.py` holds each to what stands here.

| claim | paper | left | right | factor | holds |
|---|---|---|---|---|---|"""


def markdown(rows: Sequence[Row], claims: Iterable[Row]) -> str:
    """Return a table for each scheme and model, one for each scheme's whole recipe by its parts, and the claims.

    Only the second kind uses more than the first seed.
    """
    parts = [HEAD]
    compared = [row for row in rows if row["handler"] in HANDLERS and row["seed"] == 0]
    for scheme, model in dict.fromkeys((row["scheme"], row["model"]) for row in compared):
        chosen = [row for row in compared if (row["scheme"], row["model"]) == (scheme, model)]
        parts.append(f"\n## {model}, {scheme}\n")
        parts += table(chosen)
    for scheme in dict.fromkeys(row["scheme"] for row in rows if row["handler"] not in HANDLERS):
        parts.append(LEFT_OUT.format(scheme=scheme))
        parts += left_out_table([row for row in rows if row["scheme"] == scheme])
    parts.append(CLAIMS)
    parts += ["| " + " | ".join(map(figure, claim.values())) + " |" for claim in claims]
    return "\n".join(parts) + "\n"


def left_out_table(rows: Sequence[Row]) -> list[str]:
    """Return a row for each handler that is left out, with a column for each model and twin."""
    at = {(row["model"], row["twin"], row["handler"], row["seed"]): closeness(row) for row in rows}
    models = list(dict.fromkeys((row["model"], row["twin"]) for row in rows))
    lines = [
        "| " + " | ".join(["left out", *(f"{m}, {t}" for m, t in models)]) + " |",
        "|---" * (len(models) + 1) + "|",
    ]
    for handler in dict.fromkeys(row["handler"] for row in rows if row["handler"] not in HANDLERS):
        cells = [
            [at[key] / at[*key[:2], WHOLE, key[3]] - 1 for key in at if key[:3] == (*model, handler)]
            for model in models
        ]
        name = handler.removeprefix(f"{WHOLE}, without ")
        lines.append("| " + " | ".join([name, *map(spread, cells), overall(list(itertools.chain(*cells)))]) + " |")
    return lines


def spread(found: Sequence[float]) -> str:
    """Return mean, least and largest over the seeds."""
    if not found:
        return ""
    text = f"{mean(found):+.1%} ({min(found):+.1%} to {max(found):+.1%})"
    return f"**{text}**" if max(found) < 0 else text


def overall(found: Sequence[float]) -> str:
    """Return the mean, and its standard error if there are two or more values."""
    error = f" ± {stdev(found) / len(found) ** 0.5:.1%}" if len(found) > 1 else ""
    return f"{mean(found):+.1%}{error}"


def closeness(row: Row) -> float:
    """Return the distance from the float model."""
    far: float = row["kl"] if "kl" in row else row["distance"]
    return far


def figure(value: object) -> str:
    """Return a value of a claim as text."""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[Row]) -> list[str]:
    """Return a row for each handler, with a column for each twin."""
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
    """Return the row closest to the float model."""
    return min(rows, key=closeness)


def cell(row: Row, best: bool) -> str:
    """Return what one handler does on one model, as text."""
    text = (
        f"{row['increase']:+.4f} ({row['kl']:.4f})" if "kl" in row else f"{row['retained']:.1%} ({row['distance']:.4f})"
    )
    return f"{f'**{text}**' if best else text} κ {row['kurtosis']:.1f}"
