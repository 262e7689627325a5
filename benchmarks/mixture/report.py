"""The rows of `make bench-mixture` become `benchmarks/results/mixture.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from benchmarks.mixture.cells import DROPPED, FLOAT, NSAMPLES, RANDOM_SEEDS, SEQLEN

Row = Mapping[str, Any]
HEAD = """# A trained mixture of experts

{machines}.

`make mixture` trains the model and `make bench-mixture` wrote this file and `mixture.json`: 8 experts, of which the
router chooses 2, in each of 6 layers ({parameters:,} parameters), made of books-llama-6m and trained on the bundled
books to predict what that predicts. Weights are per channel, the calibration data {nsamples} windows of {seqlen} tokens
of the bundled prose, and the scores those of text that neither training nor calibration has seen. Losses and KL are in
nats a token; increases are over the float mixture's loss of {loss:.4f}.

## Quantized

*Plain rounding* is symmetric rounding without passes, *default* the scheme's recipe, and *all tokens* the same with
`calibrate_all_experts`. An expert with fewer than four tokens for each input channel counts as rare: its Gram matrix is
shrunk towards that of all tokens. *Rounded plainly* are the experts for which plain rounding lost less on rows held
back.

| scheme | recipe | loss increase | KL | top-1 | fewest tokens of an expert | rare | rounded plainly |
|---|---|---|---|---|---|---|---|"""
PRUNED = """
## Pruned

Experts are dropped from the float model, and nothing is quantized or trained afterwards. *REAP* drops those of the
least mean of the router's weight times the norm of the expert's output, *frequency* those that see the fewest tokens,
*random* any (the mean of {seeds} seeds, and the least and the largest).

| experts dropped | by | loss increase | KL |
|---|---|---|---|"""


def markdown(rows: Sequence[Row]) -> str:
    """Return the file."""
    machines = "; ".join(dict.fromkeys(row["machine"] for row in rows))
    base = next(row for row in rows if row["scheme"] == FLOAT)
    text = HEAD.format(
        machines=machines, parameters=base["parameters"], nsamples=NSAMPLES, seqlen=SEQLEN, loss=base["loss"]
    )
    quantized = [row for row in rows if "experts" in row]
    lines = [text]
    for scheme, recipe in dict.fromkeys((row["scheme"], row["recipe"]) for row in quantized):
        found = [row for row in quantized if (row["scheme"], row["recipe"]) == (scheme, recipe)]
        tokens = [spread(found, "fewest_tokens", 0), spread(found, "rare", 0), spread(found, "rounded_plainly", 0)]
        tokens = ["", "", ""] if recipe == "plain rounding" else tokens
        cells = [scheme, recipe, increase(found, base), spread(found, "kl", 4), spread(found, "top1", 3), *tokens]
        lines.append(f"| {' | '.join(cells)} |")
    pruned = [row for row in rows if row["scheme"] == DROPPED]
    if pruned:
        lines.append(PRUNED.format(seeds=len(RANDOM_SEEDS)))
    for recipe in dict.fromkeys(row["recipe"] for row in pruned):
        found = [row for row in pruned if row["recipe"] == recipe]
        cells = [*recipe.split(", "), increase(found, base), spread(found, "kl", 4)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def increase(rows: Sequence[Row], base: Row) -> str:
    """Return the increase of the loss over the float model's."""
    return spread([{"increase": row["loss"] - base["loss"]} for row in rows], "increase", 4, "+")


def spread(rows: Sequence[Row], key: str, digits: int, sign: str = "") -> str:
    """Return the mean over seeds, and the least and the largest if there are several seeds that differ."""
    found = [row[key] for row in rows]
    texts = [f"{x:{sign}.{digits}f}" for x in (mean(found), min(found), max(found))]
    return texts[0] if texts[1] == texts[2] else f"{texts[0]} ({texts[1]} to {texts[2]})"
