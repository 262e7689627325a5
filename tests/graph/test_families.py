"""The analysis on eleven architectures, of which it knows none by name: sound, not lazy, and complete."""

import pytest
from helpers.sites import check_site, rows
from helpers.soundness import CONFIGS, family, lazy_pins, violations

from quantize.graph.allowed_transforms import AllowedTransforms
from quantize.graph.analysis import admissible_bases, find_bases


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_admissible_preserves_the_function_and_what_is_not_changes_it(name):
    case = family(name)
    bases = find_bases(case.program)
    assert not violations(case, bases)
    assert not lazy_pins(case, bases)
    assert all(b.pins for b in bases.all if b.allowed is AllowedTransforms.NONE)


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


@pytest.mark.parametrize("name", CONFIGS)
def test_the_sites_of_the_literature(name):
    bases = admissible_bases(family(name).program)
    for row in (row for row in rows() if row[0] == name):
        check_site(row, bases)


def test_the_table_covers_every_family_and_method():
    assert {(row[0], row[1]) for row in rows()} == {(n, m) for n in CONFIGS for m in ("smoothing", "R1", "R2", "CLE")}
