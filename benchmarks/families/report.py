"""The rows of `make bench-families` become `docs/families.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from benchmarks.families.families import FAMILIES
from benchmarks.families.run import CRASH, RECIPES, ROWS, SCHEMES, TOKENS, YES

Row = Mapping[str, Any]
WORSE = 1.1  # times plain rounding's distance, above which a default recipe is called worse
NOISE = 0.01  # the distance that tables of words in 8 bits make alone
HEAD = """# Families

`make bench-families` wrote this file and `benchmarks/results/families.json`: {count} tiny random models, each of a
class of its own, calibrated on {rows} rows of {tokens} random tokens, images or sounds, and judged on rows that the
runs did not see. Models of images and text are calibrated and judged on pairs of an image and a text.

- *quantized* is the share of the body's parameters, which are all but the tables of words and the linear that scores
  the vocabulary.
- The distances are ‖quantized - float‖ / ‖float‖ of the loaded artifact's first output, by plain rounding → by the
  scheme's default recipe. These models are random, so they compare recipes, and say nothing of trained models.
- *load*, *generate*, *verify* and *ONNX* are of the W4A8 default. *generate* compares the logits of 8 tokens that are
  made with the cache with those of one pass. *compressed-tensors* is of the plainly rounded W4A8, as the format has no
  place for the default's online transforms. Each export compares its result with the artifact.
- *seconds* are processor time of all that together; an empty cell below ONNX is not measured yet.
- *commit* is the commit that a row was measured at, or shortly before; rows of older commits are older code's.

{verdict}
"""
COLUMNS = ("family", "quantized", "W4A8", "W4A4", "load", "generate", "verify", "ONNX", "compressed-tensors", "seconds",
           "commit")  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    """Return the file: a table for each kind, and below it the sentences that stand in place of figures."""
    parts = [HEAD.format(count=len(rows), rows=ROWS, tokens=TOKENS, verdict=f"{verdict(rows)}{not_measured(rows)}")]
    for kind, found in groupby(rows, lambda row: FAMILIES[row["family"]].kind):
        notes: dict[str, int] = {}
        lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
        lines += ["| " + " | ".join(cells(row, notes)) + " |" for row in found]
        parts += [f"## {kind}\n", *lines, "", *(f"{number}. {note}" for note, number in notes.items())]
        parts += [""] * bool(notes)
    return "\n".join(parts).rstrip() + "\n"


def not_measured(rows: Sequence[Row]) -> str:
    """Return a paragraph that names what the command measures and has not measured yet, or nothing."""
    names = [name for name in FAMILIES if name not in {row["family"] for row in rows}]
    return f"\n\nThe command has not come yet to {len(names)}: {'; '.join(names)}." if names else ""


def verdict(rows: Sequence[Row]) -> str:
    """Return a sentence that counts what is wrong."""
    crashes = sum(str(cell).startswith(CRASH) for row in rows for cell in row.values())
    pairs = [pair for row in rows for scheme in SCHEMES if (pair := distances(row, scheme))]
    worse = sum(default > max(WORSE * plain, NOISE) for plain, default in pairs)
    return (
        f"Cells that crashed instead of saying why not: {crashes}. Defaults more than {WORSE} times as far from the "
        f"float model as plain rounding, and more than {NOISE}, which tables in 8 bits make alone: {worse} of "
        f"{len(pairs)}."
    )


def distances(row: Row, scheme: str) -> tuple[float, float] | None:
    """Return the distances of plain rounding and the default; None if there are not both."""
    plain, default = (row.get(f"{scheme} {how}") for how in RECIPES)
    return (plain, default) if isinstance(plain, float) and isinstance(default, float) else None


def cells(row: Row, notes: dict[str, int]) -> list[str]:
    """Return the cells of a row; a sentence becomes the number of a note."""
    share = row.get("quantized")
    found = [row["family"], f"{share:.1%}" if isinstance(share, float) else noted(share, notes)]
    if row.get("exported", YES) != YES:
        found[1] += " " + noted(f"not exported: {row['exported']}", notes)
    for scheme in SCHEMES:
        plain, default = (row.get(f"{scheme} {how}", "") for how in RECIPES)
        found.append(f"{shown(plain, notes)} → {shown(default, notes)}" if plain or default else "")
    found += [noted(row.get(name, ""), notes) for name in ("load", "generate", "verify", "onnx", "compressed-tensors")]
    return [*found, f"{row['seconds']:.0f}" if "seconds" in row else "", row.get("commit", "")]


def shown(cell: Any, notes: dict[str, int]) -> str:
    """Return a distance, or the number of a note."""
    return f"{cell:.3f}" if isinstance(cell, float) else noted(cell, notes)


def noted(cell: Any, notes: dict[str, int]) -> str:
    """Return `yes` and nothing as they are, and the number of a note for a sentence."""
    if cell in ("", None, YES):
        return cell or ""
    return f"({notes.setdefault(str(cell).replace('|', '/'), len(notes) + 1)})"
