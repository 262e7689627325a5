"""One small network for each way an operator treats channels: the group is as expected, sound, and not lazy."""

import pytest
from helpers.rule_cases import BODIES, NONE, ORTHOGONAL, Net, attend, case, check_body
from helpers.soundness import make_case, violations
from torch.nn import functional as F

from quantize.graph.analysis import find_bases


@pytest.mark.parametrize("name", BODIES)
def test_the_group_is_as_expected_and_sound(name):
    check_body(name)


def test_an_operator_without_a_rule_is_named():
    bases = find_bases(case("no rule").program).all
    assert next(b for b in bases if b.writers[0].parameter == "up.weight").pins == ("`cumprod` has no rule",)


def test_channels_that_enter_attention_beside_its_operands_are_pinned():
    def biased(net, h, x):
        return attend(net.gate(x), net.key(x), h, attn_mask=net.score(x).transpose(1, 2)[..., None])

    case = make_case(Net(biased))
    bases = find_bases(case.program)
    score = next(b for b in bases.all if b.writers and b.writers[0].parameter == "score.weight")
    assert (score.allowed, score.pins) == (NONE, ("`scaled_dot_product_attention` takes it aside",))
    assert not violations(case, bases)


def test_tied_embeddings_are_rotated_alike():
    """A table that is read as well must absorb T and T⁻ᵀ at once: the orthogonal group."""

    class Tied(Net):
        def forward(self, ids):
            return F.linear(F.rms_norm(self.table(ids), (12,)), self.table.weight)

    case = make_case(Tied(None))
    bases = find_bases(case.program)
    table = next(b for b in bases.all if b.writers)
    assert (table.allowed, len(table.writers), len(table.readers)) == (ORTHOGONAL, 1, 0)
    assert not violations(case, bases)
