"""The fine-tune that makes a model easier to quantize: its parts by hand, and what it does to a real model."""

from __future__ import annotations

import json
import math
import signal
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import quantize
from quantize.calibration.data import read_samples
from quantize.checkpoint.opening import open_checkpoint
from quantize.errors import QuantizeError, UsageError
from quantize.eval.perplexity import score_language
from quantize.finetuning.finetune import token_stream
from quantize.finetuning.regularized_linear import RegularizedLinear, best_clip, learned_clip
from quantize.finetuning.training import Batches, FinetuneSettings, mean_kurtosis, task_loss
from quantize.kernels.halo import input_gradient, int8_product, linear_with_int8_backward
from quantize.transforms.kurtosis import kurtosis

FEW = {"steps": 2, "batch_size": 2, "seqlen": 16}
RTN = {
    "passes": [],
    "quantizer": {"name": "rtn"},
    "weights": {"symmetric": True},
    "activations": {"symmetric": True, "clip_ratio": 1.0},
}
ROUNDED = {"group_size": 0, "seqlen": 256, "nsamples": 2}
PENALTY = 0.01
SHORT = {"steps": 30, "batch_size": 2, "seqlen": 128, "learning_rate": 3e-4}


def test_kurtosis_by_hand():
    y = torch.tensor([[1.0, -1.0, 1.0, -1.0], [0.0, 0.0, 0.0, 4.0], [5.0, 5.0, 5.0, 5.0]])
    # second row: µ = 1, squares 1 1 1 9, σ² = 3, fourth moment (3 + 81) / 4 = 21
    assert kurtosis(y).tolist() == pytest.approx([1.0, 21 / 9, 0.0])
    assert float(kurtosis(torch.randn(100_000, generator=torch.Generator().manual_seed(0)))) == pytest.approx(
        3, abs=0.1
    )


def clip_gradients(x, clip, num_bits=2):
    x, clip = torch.tensor([x], requires_grad=True), torch.tensor(clip, requires_grad=True)
    y = learned_clip(x, clip, num_bits)
    y.sum().backward()
    return float(y.detach()), float(x.grad), clip.grad.tolist()


def test_clip_gradients_by_hand():
    """Two bits over [-1, 2]: the levels -1, 0, 1, 2, so s = 1 and u = x + 1."""
    assert clip_gradients(5.0, [-1.0, 2.0]) == (2.0, 0.0, [0.0, 1.0])  # PACT above
    assert clip_gradients(-5.0, [-1.0, 2.0]) == (-1.0, 0.0, [1.0, 0.0])  # and below
    value, to_x, to_clip = clip_gradients(0.4, [-1.0, 2.0])  # LSQ inside: (round(1.4) - 1.4) / 3
    assert (value, to_x, to_clip) == (0.0, 1.0, pytest.approx([0.4 / 3, -0.4 / 3], abs=1e-6))


def test_clip_gradients_are_finite_differences_where_nothing_is_rounded():
    x = torch.linspace(-4, 5, 181, dtype=torch.float64)
    clip = torch.tensor([-1.3, 2.1], dtype=torch.float64, requires_grad=True)
    outside = x[(x < -1.3) | (x > 2.1)]
    assert torch.autograd.gradcheck(lambda clip: learned_clip(outside, clip, 4), clip)


def test_best_clip_cuts_an_outlier_and_keeps_a_grid():
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    cut = best_clip(torch.cat([x, torch.tensor([100.0])]), 4)
    assert 1 < cut[1] < 50
    assert best_clip(torch.arange(-8.0, 8.0), 4).tolist() == [-8, 7]


def relative_error(found, exact):
    """Squared, of norms."""
    return float(((found - exact).norm() / exact.norm()) ** 2)


@pytest.mark.parametrize("tokens", [512, 500])  # 500: no Hadamard matrix of that order in reach of Sylvester's alone
def test_a_left_hadamard_lowers_the_error_of_the_input_gradient_tenfold(tokens):
    """Four tokens whose gradient is 60 times larger; 1.0e-2 and 2.1e-4 for 512 tokens."""
    generator = torch.Generator().manual_seed(0)
    Ey, W = torch.randn(tokens, 256, generator=generator), torch.randn(256, 256, generator=generator)
    Ey[:4] *= 60
    plain, rotated = (relative_error(input_gradient(Ey, W, hadamard), Ey @ W) for hadamard in (False, True))
    assert 10 * rotated < plain
    assert rotated < 1e-3


@pytest.mark.parametrize("hadamard", [False, True])
def test_an_int8_backward_pass_is_near_the_exact_one(hadamard):
    generator = torch.Generator().manual_seed(0)
    X, W, bias = (torch.randn(*size, generator=generator) for size in ((2, 3, 5), (4, 5), (4,)))
    operands = [tensor.requires_grad_() for tensor in (X, W, bias)]
    exact, found = nn.functional.linear(X, W, bias), linear_with_int8_backward(X, W, bias, hadamard)
    assert torch.equal(found, exact)
    Ey = torch.randn(2, 3, 4, generator=generator)
    expected, given = (torch.autograd.grad(y, operands, Ey) for y in (exact, found))
    assert all(0 < relative_error(a, b) < 1e-3 for a, b in zip(given[:2], expected[:2], strict=True))
    assert torch.equal(given[2], expected[2])


@torch.no_grad()
def test_a_stand_in_reads_levels_and_notes_kurtosis():
    linear = nn.Linear(2, 3)
    standin = RegularizedLinear(nn.Parameter(linear.weight.T), linear.bias, True, 2, "none")
    assert torch.equal(standin(torch.zeros(0, 2)), linear(torch.zeros(0, 2)))
    assert (standin.started, standin.output_kurtosis) == (False, [])
    x = torch.tensor([[-1.0, 2.0], [0.0, 1.0]])  # two bits reach them all
    assert torch.allclose(standin(x), linear(x))
    assert standin.clip.tolist() == [-1, 2]
    assert torch.allclose(standin(x + 0.3), linear(torch.tensor([[-1.0, 2.0], [0.0, 1.0]])))
    assert float(standin.output_kurtosis[0]) == pytest.approx(float(kurtosis(linear(x)).mean()))
    standin(torch.zeros(1, 2))


@pytest.mark.parametrize("backward", ["int8", "int8_hadamard"])
def test_a_stand_in_trains_on_integers(backward):
    generator = torch.Generator().manual_seed(0)
    W, x = (torch.randn(3, 3, generator=generator) for _ in range(2))
    Ey = torch.tensor([[100.0, 0.3, -0.2], [0.1, 0.4, 1.0], [0.2, -0.7, 0.3]])
    standin = RegularizedLinear(nn.Parameter(W), None, False, 8, backward)
    standin(x).backward(Ey)
    X = learned_clip(x, standin.clip.detach(), 8)
    assert torch.allclose(standin.weight.grad, int8_product(Ey.T, X))
    inside = standin.clip.detach().clone().requires_grad_()
    learned_clip(x, inside, 8).backward(input_gradient(Ey, W, backward == "int8_hadamard"))
    assert torch.allclose(standin.clip.grad, inside.grad)


def certain(*rows):
    """A model whose logits depend on the last token only."""
    table = torch.tensor(rows).log()
    model = nn.Module()
    model.forward = lambda input_ids: SimpleNamespace(logits=table[input_ids])
    return model


def test_task_losses_by_hand():
    model, teacher, ids = (
        certain([0.5, 0.5], [0.25, 0.75]),
        certain([0.5, 0.5], [0.9, 0.1]),
        torch.tensor([[0, 1, 0]]),
    )
    assert float(task_loss(model, None, ids)) == pytest.approx(-(math.log(0.5) + math.log(0.25)) / 2)
    kl = 0.9 * math.log(0.9 / 0.25) + 0.1 * math.log(0.1 / 0.75)
    assert float(task_loss(model, teacher, ids)) == pytest.approx(kl / 2)


def settings(**changes):
    return FinetuneSettings(**({**FEW, "distill": True, "num_bits": 4, "kurtosis": 0, "learning_rate": 1e-4} | changes))


def test_windows_start_anywhere_and_come_from_the_seed():
    few = settings(batch_size=500, seqlen=3, quantized_backward="none", seed=7)
    torch.manual_seed(0)
    ids = Batches(torch.arange(5), few).draw()
    assert {tuple(row) for row in ids.tolist()} == {(0, 1, 2), (1, 2, 3), (2, 3, 4)}
    torch.manual_seed(1)
    assert torch.equal(ids, Batches(torch.arange(5), few).draw())
    assert not torch.equal(ids, Batches(torch.arange(5), few.model_copy(update={"seed": 8})).draw())


def test_too_little_text():
    prepared = SimpleNamespace(samples=SimpleNamespace(rows=[{"input_ids": torch.arange(3)}]))
    with pytest.raises(QuantizeError, match="the text holds 3 tokens, less than one window of 16"):
        token_stream(prepared, settings(quantized_backward="none", seed=0))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_and_progress_is_shown(one_layer, stories_calibration, tmp_path, tree):
    few = {**FEW, "text": stories_calibration, "kurtosis": 0.1}
    with (tmp_path / "log").open("w") as log:
        shown = Console(file=log, width=200, record=True)
        first = quantize.finetune(one_layer, output_dir=tmp_path / "first", console=shown, **few)
    torch.manual_seed(1)
    second = quantize.finetune(one_layer, output_dir=tmp_path / "second", **few)
    assert tree(first) == tree(second)
    assert (first.losses, first.kurtosis) == (second.losses, second.kurtosis)
    assert tree(first).keys() == tree(one_layer).keys()
    stream = torch.cat([row["input_ids"] for row in read_samples(stories_calibration, 16, None, None, 512).rows])
    probe = Batches(stream, settings(quantized_backward="none", seed=0)).draw()
    for model, place in ((one_layer, 0), (first.directory, 1)):
        found = mean_kurtosis(open_checkpoint(model).load(), list(first.kurtosis), probe)
        assert found == pytest.approx({path: both[place] for path, both in first.kurtosis.items()}, rel=1e-4)
    lines = shown.export_text()
    assert "fine-tuning 1/2 loss not known yet" in lines
    assert f"fine-tuning 2/2 loss {first.losses[0]:.4f}" in lines


@pytest.fixture(scope="module")
def tuned(stories, stories_calibration, tmp_path_factory):
    """Fine-tune stories260K without and with a penalty on kurtosis; λ → result."""
    made = tmp_path_factory.mktemp("tuned")
    return {
        penalty: quantize.finetune(
            stories, output_dir=made / str(penalty), text=stories_calibration, kurtosis=penalty, **SHORT
        )
        for penalty in (0, PENALTY)
    }


def largest_row(tuned):
    """Over all linears the largest max|row norm of W| / median."""
    checkpoint = open_checkpoint(tuned.directory)
    norms = [checkpoint.tensor(f"{path}.weight").norm(dim=1) for path in tuned.kurtosis]
    return max(float(norm.max() / norm.median()) for norm in norms)


@pytest.mark.slow
def test_a_penalty_lowers_kurtosis_and_the_largest_rows(tuned):
    """As arXiv 2404.03605 has it: what leaves the outputs does not turn up in the weights."""
    without, with_penalty = tuned[0], tuned[PENALTY]
    before, after = zip(*with_penalty.kurtosis.values(), strict=True)
    assert max(after) < 0.99 * max(before)
    assert max(after) < 0.99 * max(kurtosis for _, kurtosis in without.kurtosis.values())
    assert largest_row(with_penalty) < largest_row(without)


@pytest.mark.slow
def test_a_fine_tuned_model_loses_less(tuned, stories, stories_calibration, stories_dev, tmp_path):
    """W4A4, rounded plainly, loss on text that was not trained on: so also its increase over the first float model."""
    windows = [batch["input_ids"] for batch in read_samples(stories_dev, 256, 32, None, 512).batches(16)]
    losses = []
    for name, model in (("before", stories), ("after", tuned[PENALTY].directory)):
        artifact = quantize.quantize_model(
            model, scheme="W4A4", output_dir=tmp_path / name, calibration=stories_calibration, recipe=RTN, **ROUNDED
        )
        losses.append(score_language(artifact.load(), windows).loss)
    assert losses[1] < losses[0]


@pytest.mark.slow
def test_a_module_stays_as_it_is(stories_calibration, tmp_path):
    """Weights stored as [in, out], tied embeddings, biases, a frozen parameter, dropout on."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=64, n_embd=16, n_layer=1, n_head=2)).train()
    model.transformer.wte.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = quantize.finetune(model, output_dir=tmp_path / "out", text=stories_calibration, learning_rate=0.1, **FEW)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training and not model.transformer.wte.weight.requires_grad
    assert len(tuned.kurtosis) == 4
    loaded = open_checkpoint(tuned.directory).load()
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert all(not torch.equal(loaded.get_parameter(name), before[name]) for name, _ in loaded.named_parameters())
    assert json.loads((tuned.directory / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"steps": 0}, "finetune: steps: input should be greater than or equal to 1"),
        ({"num_bits": 9}, "finetune: num_bits: input should be less than or equal to 8"),
        ({"kurtosis": -1.0}, "finetune: kurtosis: input should be greater than or equal to 0"),
        ({"kurtosis": math.inf}, "finetune: kurtosis: input should be a finite number"),
        ({"learning_rate": 0}, "finetune: learning_rate: input should be greater than 0"),
        (
            {"quantized_backward": "fp8"},
            "quantized_backward: input should be 'none', 'int8' or 'int8_hadamard'",
        ),
        ({"seqlen": 513}, "--seqlen 513 is more than the 512 positions"),
    ],
)
def test_wrong_calls(wrong, sentence, one_layer, stories_calibration, tmp_path):
    with pytest.raises(UsageError, match=sentence):
        quantize.finetune(one_layer, output_dir=tmp_path / "out", **{**FEW, "text": stories_calibration, **wrong})
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_not_touched(one_layer, tmp_path):
    with pytest.raises(UsageError, match="exists already"):
        quantize.finetune(one_layer, output_dir=tmp_path)


def test_only_causal_language_models_are_fine_tuned(minilm, tmp_path):
    for model in (minilm, nn.Linear(2, 2)):
        with pytest.raises(UsageError, match="cannot be fine-tuned; give a causal language model of transformers"):
            quantize.finetune(model, output_dir=tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_fine_tune_that_diverges_leaves_nothing(one_layer, stories_calibration, tmp_path):
    with pytest.raises(QuantizeError, match="the gradient of step 1 is not finite; give a smaller learning_rate"):
        quantize.finetune(one_layer, output_dir=tmp_path / "out", text=stories_calibration, learning_rate=1e30, **FEW)
    assert not list(tmp_path.iterdir())


def test_an_interruption_is_answered_within_a_backward_pass():
    """Otherwise a step ends first, which takes half a minute in a large model."""
    weights = [nn.Parameter(torch.randn(256, 256) / 16) for _ in range(40)]
    y = torch.randn(2048, 256, requires_grad=True)
    for W in weights:
        y = RegularizedLinear(W, None, False, 4, "none")(y)
    y.register_hook(lambda _: signal.setitimer(signal.ITIMER_REAL, 0.001) and None)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            y.sum().backward()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert weights[0].grad is None  # the first linear's product comes last
