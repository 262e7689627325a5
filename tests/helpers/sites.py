"""These functions read the table in docs/sites.md and check whether a row of it holds."""

import re
from pathlib import Path

from helpers.soundness import CONFIGS, describe

from quantize.graph.allowed_transforms import AllowedTransforms

SITES = Path(__file__).parents[2] / "docs" / "sites.md"
GROUPS = {
    "diagonal": AllowedTransforms.DIAGONAL,
    "positive diagonal": AllowedTransforms.POSITIVE_DIAGONAL,
    "orthogonal": AllowedTransforms.ORTHOGONAL,
    "centred orthogonal": AllowedTransforms.CENTRED_ORTHOGONAL,
}


def rows():
    """Return the table in docs/sites.md: model, method, written by, read by, what is allowed or why not."""
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in SITES.read_text().splitlines() if "|" in line]
    return [row for row in cells if row[0] in CONFIGS]


def short(name):
    """Shorten `…layers.0.self_attn.v_proj.weight` to `v_proj`."""
    return name.removesuffix(".weight").rsplit(".", 1)[-1]


def check_site(row, bases):
    """Check that one row of the table holds in every layer."""
    _, _, writer, readers, answer = row
    for layer in (0, 1) if "{i}" in writer else (0,):
        path, wanted = re.escape(writer.format(i=layer)), set(re.findall(r"\w+", readers))
        written = [b for b in bases if any(re.search(rf"(^|\.){path}(\.weight)?$", e.parameter) for e in b.writers)]
        basis = min(written, key=lambda b: not wanted <= {short(e.parameter) for e in b.readers})
        if answer in GROUPS:
            assert {short(e.parameter) for e in basis.readers} == wanted, describe(basis)
            assert GROUPS[answer] in basis.allowed, describe(basis)
            stronger = {
                "positive diagonal": AllowedTransforms.DIAGONAL,
                "centred orthogonal": AllowedTransforms.ORTHOGONAL,
            }.get(answer)
            assert stronger is None or stronger not in basis.allowed
        else:
            quoted = [part.format(i=layer) for part in re.findall(r"`([^`]+)`", answer)]
            assert basis.allowed is AllowedTransforms.NONE, describe(basis)
            assert all(any(part in pin for pin in basis.pins) for part in quoted), describe(basis)
