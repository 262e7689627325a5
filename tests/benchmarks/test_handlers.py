"""What `make bench-handlers` is made of: outliers by kind, kurtosis and cost, rows that resume, and the tables."""

import pytest
import torch
from torch import nn

from benchmarks.handlers.bench import SCHEMES, SEEDS, TOGETHER, cells, missing
from benchmarks.handlers.handlers import HANDLERS, LANGUAGE_ONLY, WHOLE, left_out, whole
from benchmarks.handlers.report import markdown
from quantize.checkpoint.opening import open_checkpoint
from quantize.errors import UsageError
from quantize.eval.kurtosis import input_kurtosis, online_cost
from quantize.eval.planted_outlier_kinds import HEIGHT, KINDS, plant_kind, spike_factors
from quantize.eval.report import kurtosis_report
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.passes import PASSES
from quantize.passes.ordering import check_order
from quantize.quantizers import QUANTIZERS
from quantize.recipe.recipe import load_recipe
from quantize.scheme.scheme import ActivationArgs, RuntimeSmoothArgs, Scheme, WeightArgs
from quantize.transforms.online import Hadamard

X = torch.tensor([[1.0, 5.0, 1.0, 1.0], [1.0, 0.0, 4.0, 1.0], [1.0, 0.0, 0.0, 1.0]])


def test_peaked_channels_are_scaled():
    assert spike_factors(X, "token_sparse").tolist() == [1, 30, 30, 1]
    assert sorted(spike_factors(X, "channel").tolist()) == [1, 1, 30, 30]


def test_two_spikes_of_one_token_reach_the_same_height():
    d = spike_factors(X, "two_spike")  # the token with the highest peak is the first; its largest are 5 and a 1
    spiked = X[0] * d
    height = HEIGHT * float(X.square().mean().sqrt())
    assert sorted(spiked.tolist())[2:] == pytest.approx([height, height])
    assert int((d == 1).sum()) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_twin_computes_the_same_function(kind, one_layer, tmp_path):
    plant_kind(one_layer, tmp_path / "twin", kind)
    ids = torch.arange(48)[None]
    with torch.no_grad():
        easy, hard = (open_checkpoint(m).load()(ids).logits for m in (one_layer, tmp_path / "twin"))
    assert 0 < float((easy - hard).abs().max()) < 1e-4 * float(easy.abs().max())


def made(scheme, online=()):
    weight = QUANTIZERS["rtn"]().quantize(torch.eye(6, 16), scheme.weights, None, torch.float32)
    return nn.Sequential(QuantizedLinear(weight, None, scheme, online))


def test_costs_by_hand():
    """16 channels to 6: 96 multiply-adds; a Hadamard matrix of 4 ⊗ 4 adds 16 · 8, groups of 8 add 16 + 6 · 2."""
    plain = Scheme(weights=WeightArgs(num_bits=4), activations=ActivationArgs(num_bits=4))
    smooth = ActivationArgs(num_bits=4, runtime_smooth=RuntimeSmoothArgs(group_size=8))
    assert online_cost(made(plain)) == 0
    assert online_cost(made(plain, [Hadamard(16)])) == pytest.approx(128 / 96)
    assert online_cost(made(plain.model_copy(update={"activations": smooth}))) == pytest.approx(28 / 96)


def test_kurtosis_is_that_of_what_the_quantizer_sees():
    """One channel of 16 has a kurtosis of 16 - 2 + …; a Hadamard matrix makes all magnitudes equal, kurtosis 1."""
    plain = Scheme(weights=WeightArgs(num_bits=4), activations=ActivationArgs(num_bits=4))
    spike = torch.zeros(1, 16)
    spike[0, 3] = 5.0
    before = input_kurtosis(made(plain), {"input": spike}, ["0"])["0"]
    after = input_kurtosis(made(plain, [Hadamard(16)]), {"input": spike}, ["0"])["0"]
    assert before > 10
    assert after == pytest.approx(1.0, abs=0.3)


@pytest.mark.parametrize("changes", [*HANDLERS.values(), *(c for s in SCHEMES for c in left_out(s).values())])
def test_every_handler_is_a_legal_recipe(changes):
    check_order([PASSES.make(settings) for settings in changes.get("passes", ())])


def test_what_is_left_out_of_a_default_recipe():
    """Each handler, the learning of rotations without the rotations, and what is better than GPTQ; never the fold."""
    default = load_recipe("W4A4", whole("W4A4"))
    left = {name: load_recipe("W4A4", changes) for name, changes in left_out("W4A4").items()}
    assert len(left) == len(default.passes) - 1 + 3
    for recipe in left.values():
        assert recipe.passes[-1] == default.passes[-1] or recipe == left[f"{WHOLE}, without activation_clip"]
        assert {"name": "fold_norms"} in recipe.passes
        assert (recipe.passes, recipe.quantizer) != (default.passes, default.quantizer)
    assert list(left_out("W8A8")) == [f"{WHOLE}, without smoothquant"]


def test_what_is_measured_is_not_measured_again():
    everything = missing([])
    assert max(len(job[3]) for job in everything) == TOGETHER
    assert len({job[:3] for job in everything}) == len(SCHEMES) * 2 * 4
    row = {"model": "MiniLM", "twin": "channel", "scheme": "W4A8", "handler": "AQAS", "seed": 0}
    left = [cell for job in missing([row]) if job[:3] == ("MiniLM", "channel", "W4A8") for cell in job[3]]
    assert set(cells("MiniLM", "W4A8")) - set(left) == {("AQAS", 0)}
    language = {handler for handler, _ in cells("books-llama", "W4A8")}
    assert language - {handler for handler, _ in cells("MiniLM", "W4A8")} == LANGUAGE_ONLY
    assert {(WHOLE, seed) for seed in SEEDS["W4A8"]} < set(left)
    assert {(WHOLE, seed) for seed in SEEDS["W4A4"]} < set(cells("MiniLM", "W4A4"))
    assert everything[0][3][0][1] == SEEDS["W4A4"][0] < everything[-1][3][0][1]


def test_tables_mark_the_best_and_claims_that_do_not_hold():
    common = {"scheme": "W4A4", "seed": 0, "cost": 0.05, "kurtosis": 3.0, "kurtosis_before": 20.0}
    rows = [
        common | {"model": "books-llama", "twin": "as it is", "handler": "AQAS", "increase": 0.2, "kl": 0.1},
        common | {"model": "books-llama", "twin": "as it is", "handler": WHOLE, "increase": 0.1, "kl": 0.2},
        common | {"model": "MiniLM", "twin": "channel", "handler": "AQAS", "retained": 0.5, "distance": 0.2},
        common | {"model": "MiniLM", "twin": "channel", "handler": WHOLE, "retained": 0.9, "distance": 0.1},
    ]
    claim = {"claim": "x ≤ y", "paper": "p", "left": 2.0, "right": 1.0, "factor": 1.0, "holds": False}
    lines = markdown(rows, [claim]).splitlines()
    assert "| AQAS | 5.0% | **+0.2000 (0.1000)** κ 3.0 |" in lines
    assert "| whole recipe | 5.0% | **90.0% (0.1000)** κ 3.0 |" in lines
    assert "| x ≤ y | p | 2 | 1 | 1 | **no** |" in lines


def test_what_a_handler_adds_is_a_ratio_seed_by_seed():
    common = {"scheme": "W4A4", "model": "MiniLM", "twin": "as it is", "cost": 0.0, "kurtosis": 1.0}
    common |= {"retained": 1.0, "kurtosis_before": 1.0}
    found = {WHOLE: (0.1, 0.2), f"{WHOLE}, without a": (0.12, 0.2), f"{WHOLE}, without b": (0.09, 0.1)}
    rows = [common | {"handler": h, "seed": s, "distance": d[s]} for h, d in found.items() for s in (0, 1)]
    lines = markdown(rows, []).splitlines()
    assert "| a | +10.0% (+0.0% to +20.0%) | +10.0% ± 10.0% |" in lines
    assert "| b | **-30.0% (-50.0% to -10.0%)** | -30.0% ± 20.0% |" in lines


def test_kurtosis_of_each_basis_is_shown(cli, artifact_one_layer, one_layer, stories_dev):
    shown = cli("eval", artifact_one_layer.directory, "--against", one_layer, "--text", stories_dev, "--kurtosis")
    assert shown.code == 0
    assert "q_proj, k_proj" in shown.out
    refused = cli("eval", artifact_one_layer.directory, "--text", stories_dev, "--kurtosis")
    assert (refused.code, refused.err) == (2, "error: --kurtosis compares with the float model; give --against\n")
    with pytest.raises(UsageError, match=r"holds no manifest\.json"):
        kurtosis_report(one_layer, str(one_layer), stories_dev)
