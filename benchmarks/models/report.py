"""The rows of `make bench-models` become `benchmarks/results/models.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.models.cells import DEFAULT, FLOAT, MODELS, PEERS, PLAIN, SCHEMES

Row = Mapping[str, Any]
HEAD = """# Real models, every scheme

{machines}.

`make bench-models` wrote this file and `models.json`. A model is calibrated on 32 windows of 512 tokens (MiniLM: 128)
of the bundled prose and scored on 16 windows of 256 tokens of each text. *Plain rounding* is symmetric
rounding without passes, *default* the scheme's recipe, *tuned* the `-tuned` recipe. llm-compressor 0.14 is calibrated
and scored on the same token ids, in float32, with symmetric weights in groups. Losses and KL are in nats per token;
increases are over the float model's loss. CPU minutes are processor time, of which two idle cores spend two a minute,
and like the peak of resident memory those of the run alone, with the interpreter and without the scores; a run of ours
with data holds some of the windows back and judges itself on them, within that time. MB and GB are of 10⁶ and 10⁹
bytes.
"""
SHORT = """
## In short

Plain rounding → default, and the llm-compressor recipe nearest to the float model (KL): the increase of the loss on the
first text of the tables below, and of MiniLM the part of the float model's Spearman correlation that is left.
"""


def markdown(rows: Sequence[Row]) -> str:
    """Return the file: the short table, then each model's table and continuations."""
    machines = "; ".join(dict.fromkeys(row["machine"] for row in rows))
    parts = [HEAD.format(machines=machines), SHORT, *short_table(rows)]
    for name in MODELS:
        own = [row for row in rows if row["model"] == name]
        parts += [f"\n## {name}\n", *model_table(own), *continuations(own)] if own else []
    return "\n".join(parts) + "\n"


def short_table(rows: Sequence[Row]) -> list[str]:
    """Return a table of schemes by models, as in the README: plain rounding → default, and the best peer."""
    at = {(row["model"], row["scheme"], row["recipe"]): row for row in rows}
    names = [name for name in MODELS if any(row["model"] == name for row in rows)]
    lines = ["| scheme | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for scheme in SCHEMES:
        found = []
        for name in names:
            plain, default = (headline(at, at.get((name, scheme, recipe))) for recipe in (PLAIN, DEFAULT))
            peers = [at[name, scheme, peer] for peer in PEERS if "texts" in at.get((name, scheme, peer), ())]
            text = f"{plain or '?'} → {default or '?'}" if plain or default else ""
            best = min(peers, key=lambda row: first(row)["kl"], default=None)
            found.append(text + (f"; {headline(at, best)} ({short_name(best['recipe'])})" if best else ""))
        lines.append(f"| {scheme} | " + " | ".join(found) + " |" if any(found) else "")
    return [line for line in lines if line]


def headline(at: Mapping[tuple[str, str, str], Row], row: Row | None) -> str:
    """Return the one figure of a row on its first text; nothing for a row without scores."""
    if row is None or "texts" not in row:
        return ""
    found = first(row)
    if "retained" in found:
        return f"{found['retained']:.1%}"
    base = at.get((row["model"], FLOAT, ""), {}).get("texts", {}).get(next(iter(row["texts"])))
    return f"{found['loss'] - base['loss']:+.4f}" if base else ""


def first(row: Row) -> Row:
    """Return the scores on the first text."""
    scores: Row = next(iter(row["texts"].values()))
    return scores


def short_name(recipe: str) -> str:
    """Return a peer's recipe without the tool's name."""
    return recipe.removeprefix("llm-compressor: ")


def model_table(rows: Sequence[Row]) -> list[str]:
    """Return the table of one model, with the columns of each text side by side."""
    texts = list(dict.fromkeys(text for row in rows for text in row.get("texts", ())))
    base = next((row for row in rows if row["scheme"] == FLOAT), {})
    names = ("loss increase", "KL", "top-1") if MODELS[rows[0]["model"]].language else ("retained", "distance")
    heads = [f"{text}: {names[0]}" if at == 0 else names[at] for text in texts for at in range(len(names))]
    columns = ["scheme", "recipe", *heads, "MB", "CPU minutes", "peak GB"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [row["scheme"], row["recipe"]]
        if "error" in row:
            cells += [f"no figures: {row['error'].replace('|', '/')}"] + [""] * (len(columns) - 3)
        else:
            for text in texts:
                cells += figures(row["texts"].get(text), base.get("texts", {}).get(text), len(names))
            cells += [f"{row['artifact_mb']:.1f}"]
            cells += [f"{row['seconds'] / 60:.1f}", f"{row['peak_mb'] / 1e3:.2f}"] if "seconds" in row else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def figures(found: Row | None, base: Row | None, count: int) -> list[str]:
    """Return the cells of one row on one text: increase, KL and top-1, or Spearman retained and distance."""
    if found is None:
        return [""] * count
    if "retained" in found:
        return [f"{found['retained']:.1%}", f"{found['distance']:.4f}"]
    if "spearman" in found:
        return [f"(Spearman {found['spearman']:.4f})", ""]
    if "kl" not in found:
        return [f"(loss {found['loss']:.4f})", "", ""]
    increase = f"{found['loss'] - base['loss']:+.4f}" if base else ""
    return [increase, f"{found['kl']:.4f}", f"{found['top1']:.3f}"]


def continuations(rows: Sequence[Row]) -> list[str]:
    """Return what each row's model writes after the prompt, the float model first."""
    found = [row for row in rows if "continuation" in row]
    if not found:
        return []
    lines = ["\nGreedy continuations of one prompt (`benchmarks/models/windows.py`):\n"]
    return lines + [
        f"- {row['scheme']} {row['recipe']}".rstrip() + f": {one_line(row['continuation'])}" for row in found
    ]


def one_line(text: str) -> str:
    """Return a text as code on one line."""
    shown = text.replace("\n", "⏎").replace("`", "'")
    return f"`{shown}`"
