"""The bench of the trained mixture: its text, its cells, how it is made of a dense model, and the tables by hand."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.mixture.cells import (
    ALL,
    DEFAULT,
    DROPPED,
    FEW_WINDOWS,
    FLOAT,
    NSAMPLES,
    PLAIN,
    RANDOM,
    SCARCE,
    SCHEMES,
    Cell,
    cells,
    changes,
    missing,
    position,
)
from benchmarks.mixture.report import markdown
from benchmarks.mixture.text import BOOKS, TEACHER, parts
from benchmarks.mixture.train import EXPERTS, NEURONS, TOP, upcycled
from quantize.recipe.recipe import load_recipe

FLOAT_ROW = {"scheme": FLOAT, "recipe": "", "seed": 0, "loss": 4.0, "parameters": 12_000_000, "machine": "a CPU"}


def row(scheme, recipe, loss, seed=0, **more):
    found = {
        "scheme": scheme,
        "recipe": recipe,
        "seed": seed,
        "loss": loss,
        "kl": 0.5,
        "top1": 0.75,
        "machine": "a CPU",
    }
    return found | more


def test_every_recipe_is_one_and_only_one_rounds_plainly():
    for scheme in SCHEMES:
        plain = load_recipe(scheme, changes(Cell(scheme, PLAIN, 0)))
        assert (plain.passes, plain.quantizer) == ((), {"name": "rtn"})
        default = load_recipe(scheme, changes(Cell(scheme, DEFAULT, 0)))
        assert default == load_recipe(scheme, None, nsamples=NSAMPLES)
        assert load_recipe(scheme, changes(Cell(scheme, ALL, 0))) == default.model_copy(
            update={"calibrate_all_experts": True}
        )
    few = [load_recipe("W4A4", changes(Cell("W4A4", recipe, 0))) for recipe in SCARCE]
    assert [(x.nsamples, x.calibrate_all_experts) for x in few] == [(FEW_WINDOWS, False), (FEW_WINDOWS, True)]


def test_what_has_a_row_is_not_measured_again():
    assert missing([]) == cells()
    assert len(set(cells())) == len(cells())
    rows = [FLOAT_ROW, row("W4A8", DEFAULT, 4.1)]
    assert set(cells()) - set(missing(rows)) == {Cell(FLOAT, "", 0), Cell("W4A8", DEFAULT, 0)}
    assert position(rows[0]) == 0 < position(rows[1])


def test_no_text_is_in_both_parts():
    trained, unseen = parts()
    assert unseen in BOOKS.read_text() and unseen[:200] not in trained
    assert 0.15 < len(unseen) / len(BOOKS.read_text()) < 0.25


def test_experts_begin_as_parts_of_the_dense_model():
    """In the mean an expert computes what the dense MLP does, and everything else is that of the dense model."""
    dense = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    model = upcycled(dense, torch.Generator().manual_seed(0))
    mlp, layer = dense.model.layers[0].mlp, model.model.layers[0].mlp
    assert layer.experts.gate_up_proj.shape == (EXPERTS, 2 * NEURONS, 256)
    gate = layer.experts.gate_up_proj[3, :NEURONS]
    rows = torch.cdist(gate, mlp.gate_proj.weight).argmin(-1)
    assert len(rows.unique()) == NEURONS
    assert torch.equal(gate, mlp.gate_proj.weight[rows])
    assert torch.equal(layer.experts.gate_up_proj[3, NEURONS:], mlp.up_proj.weight[rows])
    torch.testing.assert_close(layer.experts.down_proj[3], 3 * mlp.down_proj.weight[:, rows])
    assert torch.equal(model.model.layers[5].self_attn.q_proj.weight, dense.model.layers[5].self_attn.q_proj.weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (EXPERTS, TOP)


def test_the_tables_by_hand():
    experts = {"experts": 96, "rare": 7, "fewest_tokens": 90, "rounded_plainly": 2}
    rows = [
        FLOAT_ROW,
        row("W4A4", PLAIN, 4.3, **experts),
        row("W4A4", DEFAULT, 4.1, **experts),
        row("W4A4", DEFAULT, 4.2, seed=1, **(experts | {"fewest_tokens": 80})),
        row(DROPPED, f"25 %, {RANDOM}", 4.5),
        row(DROPPED, f"25 %, {RANDOM}", 4.7, seed=1),
    ]
    text = markdown(rows)
    assert "12,000,000 parameters" in text and "loss of 4.0000" in text
    assert "| W4A4 | plain rounding | +0.3000 | 0.5000 | 0.750 |  |  |  |" in text
    assert "| W4A4 | default | +0.1500 (+0.1000 to +0.2000) | 0.5000 | 0.750 | 85 (80 to 90) | 7 | 2 |" in text
    assert "| 25 % | random | +0.6000 (+0.5000 to +0.7000) | 0.5000 |" in text


def test_a_table_without_pruned_rows_has_no_such_heading():
    assert "## Pruned" not in markdown(
        [FLOAT_ROW, row("W4A4", PLAIN, 4.3, experts=1, rare=0, fewest_tokens=0, rounded_plainly=0)]
    )


@pytest.mark.parametrize("cell", [Cell("W4A16", PLAIN, 0), Cell("W4A8", PLAIN, 0)])
def test_weights_alone_need_no_activations(cell):
    assert ("activations" in changes(cell)) == (cell.scheme == "W4A8")
