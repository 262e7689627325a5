"""Tuning of the rounding: starts at what was rounded, ends nearer to the float model, gives the same bytes again."""

import pytest
import torch

from quantize.calibration.data import read_samples
from quantize.checkpoint.opening import open_checkpoint
from quantize.formats.qtensor import QTensor
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.pipeline.steps.tune import STELinear, relative_error, shuffled, to_qtensor
from quantize.quantizers import QUANTIZERS
from quantize.scheme.scheme import ActivationArgs, Scheme, WeightArgs
from quantize.transforms.online import Hadamard

MXFP4 = Scheme(
    weights=WeightArgs(num_bits=4, format="mxfp4", group_size=32),
    activations=ActivationArgs(num_bits=4, format="mxfp4"),
)
INT4 = Scheme(weights=WeightArgs(num_bits=4, symmetric=False, group_size=16), activations=ActivationArgs(num_bits=8))
NF4 = Scheme(weights=WeightArgs(num_bits=4, format="nf4", group_size=32))


def rounded(scheme, W):
    weight = QUANTIZERS["rtn"]().quantize(W, scheme.weights, None, torch.float32)
    return QuantizedLinear(weight, torch.ones(len(W)), scheme, [Hadamard(W.shape[1])])


@pytest.mark.parametrize("scheme", [INT4, MXFP4, NF4], ids=["int", "mxfp4", "nf4"])
def test_tuning_starts_at_what_was_rounded(scheme):
    rng = torch.Generator().manual_seed(0)
    W, x = torch.randn(6, 64, generator=rng), torch.randn(5, 64, generator=rng)
    done = rounded(scheme, W)
    tuned = STELinear(done, W)
    assert torch.allclose(tuned(x), done.fake_quantized(x), atol=1e-4)
    again, before = to_qtensor(tuned), done.qtensor()
    assert torch.equal(again.data, before.data)
    assert torch.equal(again.dequantize(), before.dequantize())


def test_a_weight_starts_as_near_to_its_value_as_its_integer_allows():
    """Scale 1: 0.3 was rounded to 0 and stays 0.3; 2.6 was rounded down to 2, of which 2.49 is the nearest."""
    scheme = Scheme(weights=WeightArgs(num_bits=4))
    weight = QTensor.pack(torch.tensor([[0, 2, 7]]), torch.ones(1, 1), None, scheme.weights)
    tuned = STELinear(QuantizedLinear(weight, None, scheme), torch.tensor([[0.3, 2.6, 7.0]]))
    assert tuned.u.tolist()[0] == pytest.approx([0.3, 2.49, 7.0])
    tuned(torch.ones(1, 3)).sum().backward()
    assert tuned.u.grad.tolist() == [[1.0, 1.0, 1.0]]  # straight through the rounding


def test_relative_error_by_hand():
    y = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    assert float(relative_error(y + torch.tensor([[0.0, 5.0], [0.0, 0.0]]), y)) == pytest.approx(0.5)


def test_batches_come_in_turn():
    order = shuffled(3, torch.Generator().manual_seed(0))
    assert sorted(next(order) for _ in range(3)) == sorted(next(order) for _ in range(3)) == [0, 1, 2]


@pytest.mark.slow
def test_tuning_brings_a_model_nearer_to_the_float_model(stories, small_run, tree, stories_dev):
    """The KL on text not seen falls by a fifth; the same run gives the same bytes."""
    rows = torch.stack([row["input_ids"] for row in read_samples(stories_dev, 64, 8, None, 512).rows])

    def run(name, **recipe):
        return small_run(stories, "W4A16", name, recipe={"passes": [], **recipe}, nsamples=128, seqlen=128)

    @torch.no_grad()
    def kl(artifact):
        target, found = (
            m(input_ids=rows).logits.log_softmax(-1) for m in (open_checkpoint(stories).load(), artifact.load())
        )
        return float((target.exp() * (target - found)).sum(-1).mean())

    tuned = run("tuned", tune={"steps": 100})
    assert kl(tuned) < 0.8 * kl(run("plain"))
    assert tree(tuned) == tree(run("again", tune={"steps": 100}))
