"""What page and model card say in words and in tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby

from quantize.artifact.report.findings import Findings, HeldOut
from quantize.graph.alike_bases import anonymous

WORST = 8  # linears that the page names
Row = tuple[str, ...]


def sizes(found: Findings) -> Iterator[Row]:
    """Yield labels and figures: bytes, share of the body, losses."""
    if found.bytes and found.float_bytes:
        yield "weights", f"{megabytes(found.bytes)}, {found.bytes / found.float_bytes:.1%} of the float model's"
        yield "float model", megabytes(found.float_bytes)
    if found.body is not None:
        share = found.body.quantized / max(1, found.body.parameters)
        yield "body quantized", f"{share:.1%} of {found.body.parameters:,} parameters"
    if found.schemes:
        yield "schemes", ", ".join(f"{count} × {label}" for label, count in found.schemes.items())
    passes = found.gate.passes.values()
    if worst := [x for blocks in passes for x in blocks.values()]:
        yield "largest difference at the gate", f"{max(worst):.1e}"


def losses(found: Findings) -> list[Row]:
    """Return a header and rows of figures on the rows held back; [] if there were none."""
    judged = found.held_out
    if judged is None:
        return []
    names = [name for name in ("loss", "kl", "error") if name in judged.quantized]
    header = ("", *({"loss": "loss (nats)", "kl": "KL to float", "error": "relative error"}[name] for name in names))
    models = {
        "float model": judged.float_model,
        "plain rounding": judged.plain_rounding,
        "as quantized": judged.quantized,
    }
    return [
        header,
        *((model, *(f"{x[name]:.4f}" if name in x else "–" for name in names)) for model, x in models.items() if x),
    ]


def judged_on(judged: HeldOut) -> str:
    """Say which rows the figures are of."""
    where = f"{judged.tokens:,} tokens" if judged.tokens else f"{judged.rows} samples"
    return f"{where} of the {judged.source} that the run did not see"


def warnings(found: Findings) -> list[str]:
    """Return what a reader must know before the result is used."""
    given = [found.held_out.warning] if found.held_out and found.held_out.warning else []
    if paths := found.rounded_without_data:
        given.append(f"no calibration row reached {listed(paths)}, which got plain rounding")
    return given


def worst_linears(found: Findings) -> list[Row]:
    """Return a header and the linears of the largest errors as quantized."""
    worst = sorted(found.report.linears.items(), key=lambda item: (-item[1].quantized, item[0]))[:WORST]
    rows = [(path, f"{x.plain_rounding:.4f}", f"{x.quantized:.4f}") for path, x in worst]
    return [("linear", "rounded to nearest", "as quantized"), *rows] if rows else []


def schemes_by_layer(found: Findings) -> list[Row]:
    """Return a header and rows of what each layer's linears and tables hold, neighbouring layers alike in one row."""
    settings, layers = found.quantization, dict[str, Counter[str]]()
    for path, entry in settings.modules.items():
        label = (entry.scheme or settings.scheme).label + (f" × {entry.experts} experts" if entry.experts else "")
        layers.setdefault(layer_of(path), Counter())[label] += 1
    for path in settings.tables:
        layers.setdefault(layer_of(path), Counter())["table in 8 bits"] += 1
    rows = []
    for (_, counts), group in groupby(layers.items(), key=lambda item: (anonymous(f"{item[0]}."), item[1])):
        first, *others = [name for name, _ in group]
        rows.append((f"{first} to {others[-1].rpartition('.')[2]}" if others else first, counted(counts)))
    return [("layer", "linears"), *rows]


def layer_of(path: str) -> str:
    """Return `model.layers.7` for `model.layers.7.mlp.up_proj`, and the path itself where no layer has a number."""
    match = re.match(r".*?\.\d+(?=\.)", path)
    return match[0] if match else path


def left_in_float(found: Findings) -> list[Row]:
    """Return a header and rows of what stays in floating point, with the reasons."""
    left = found.body.left if found.body else []
    rows = [(f"{x.parameters:,}", x.largest + more(x.tensors - 1), x.reason) for x in left]
    return [("parameters", "largest", "why"), *rows] if rows else []


def experts(found: Findings) -> str:
    """Say how many experts saw how little; '' without experts."""
    counts = [count for row in found.expert_tokens.values() for count in row]
    if not counts:
        return ""
    return (
        f"{len(counts):,} experts saw {min(counts):,} to {max(counts):,} calibration tokens; {counts.count(0):,} saw "
        "none, and were rounded to nearest"
    )


def counted(counts: Mapping[str, int]) -> str:
    """Return `7 × W4A8, 1 × W8A16`."""
    return ", ".join(f"{count} × {label}" for label, count in counts.items())


def listed(names: Iterable[str], most: int = 4) -> str:
    """Return the first names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + more(len(names) - most)


def more(count: int) -> str:
    """Return ` and 3 more`, or '' for none."""
    return f" and {count} more" if count > 0 else ""


def megabytes(size: int) -> str:
    """Return bytes as people read them."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
