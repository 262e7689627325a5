"""The analysis on eleven architectures, of which it knows none by name: sound, not lazy, and complete."""

import re
from pathlib import Path

import pytest
from helpers.soundness import CONFIGS, describe, family, lazy_pins, violations

from quantize.graph.analysis import admissible_bases, find_bases
from quantize.graph.transform_group import AllowedTransforms

SITES = Path(__file__).parents[2] / "docs" / "sites.md"
GROUPS = {
    "diagonal": AllowedTransforms.DIAGONAL,
    "positive diagonal": AllowedTransforms.POSITIVE_DIAGONAL,
    "orthogonal": AllowedTransforms.ORTHOGONAL,
    "centred orthogonal": AllowedTransforms.CENTRED_ORTHOGONAL,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_admissible_preserves_the_function_and_what_is_not_changes_it(name):
    case = family(name)
    bases = find_bases(case.program)
    assert not violations(case, bases)
    assert not lazy_pins(case, bases)
    assert all(b.pins for b in bases.all if b.group is AllowedTransforms.NONE)


@pytest.mark.parametrize("name", CONFIGS)
def test_so_it_is_once_gains_are_folded(name):
    folded, gains = family(name).with_unit_gains()
    bases = find_bases(folded.program, gains)
    assert not violations(folded, bases)
    assert not lazy_pins(folded, bases)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_operator_that_touches_channels_has_a_rule_or_is_named(name):
    pins = {pin for basis in find_bases(family(name).program).all for pin in basis.pins}
    assert not [pin for pin in pins if "form that is not known" in pin]
    assert {pin for pin in pins if "has no rule" in pin} <= {"`topk` has no rule"}


def rows():
    """The table in docs/sites.md: model, method, written by, read by, group or reason."""
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in SITES.read_text().splitlines() if "|" in line]
    return [row for row in cells if row[0] in CONFIGS]


def short(name):
    """`…layers.0.self_attn.v_proj.weight` → `v_proj`."""
    return name.removesuffix(".weight").rsplit(".", 1)[-1]


def check_site(row, bases):
    """One row of the table holds in every layer."""
    _, _, writer, readers, answer = row
    for layer in (0, 1) if "{i}" in writer else (0,):
        path, wanted = re.escape(writer.format(i=layer)), set(re.findall(r"\w+", readers))
        written = [b for b in bases if any(re.search(rf"(^|\.){path}(\.weight)?$", e.parameter) for e in b.writers)]
        basis = min(written, key=lambda b: not wanted <= {short(e.parameter) for e in b.readers})
        if answer in GROUPS:
            assert {short(e.parameter) for e in basis.readers} == wanted, describe(basis)
            assert GROUPS[answer] in basis.group, describe(basis)
            stronger = {
                "positive diagonal": AllowedTransforms.DIAGONAL,
                "centred orthogonal": AllowedTransforms.ORTHOGONAL,
            }.get(answer)
            assert stronger is None or stronger not in basis.group
        else:
            quoted = [part.format(i=layer) for part in re.findall(r"`([^`]+)`", answer)]
            assert basis.group is AllowedTransforms.NONE, describe(basis)
            assert all(any(part in pin for pin in basis.pins) for part in quoted), describe(basis)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_sites_of_the_literature(name):
    bases = admissible_bases(family(name).program)
    for row in (row for row in rows() if row[0] == name):
        check_site(row, bases)


def test_the_table_covers_every_family_and_method():
    assert {(row[0], row[1]) for row in rows()} == {(n, m) for n in CONFIGS for m in ("smoothing", "R1", "R2", "CLE")}
