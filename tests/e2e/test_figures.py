"""The claims about quality, on real models, with the default recipes. Slow; the figures are those of the README."""

import pytest
import torch

import quantize
from quantize.calibration.data import read_samples
from quantize.checkpoint.opening import open_checkpoint
from quantize.checkpoint.tokenizer import load_tokenize
from quantize.eval.perplexity import score_language
from quantize.eval.planted_outliers import plant
from quantize.eval.report import evaluate

pytestmark = pytest.mark.slow

GOALS = {
    "w8a8": 0.0015,  # by rows: 0.0010 if two of the 32 are held back and -0.0005 if none is, KL 0.0011 both times
    "w4a16": 0.060, "w4a8": 0.065, "w4a4": 0.145,
    "w4a16-tuned": 0.050, "w4a8-tuned": 0.050,
    "w4a4-tuned": 0.130,  # learning ends elsewhere with each order of sums: 0.112 to 0.124 by seed and processor
}  # fmt: skip


@pytest.mark.parametrize("recipe", GOALS)
def test_loss_increase_on_stories(recipe, stories, stories_calibration, stories_dev, tmp_path):
    """Nats per token above the float model."""
    artifact = quantize.quantize_model(
        stories, recipe=recipe, output_dir=tmp_path / "out", calibration=stories_calibration, group_size=0, seqlen=256
    )
    scores = evaluate(artifact.directory, stories_dev, str(stories))
    assert scores["loss_against"] == pytest.approx(1.286, abs=1e-3)
    assert scores["loss_increase"] < GOALS[recipe]
    assert recipe != "w8a8" or scores["kl"] < 0.0012  # which the choice of rows hardly moves


@pytest.fixture(scope="module")
def planted(books, tmp_path_factory):
    directory = tmp_path_factory.mktemp("planted") / "twin"
    plant(books, directory)
    return directory


@pytest.fixture(scope="module")
def windows(books, books_heldout):
    samples = read_samples(books_heldout, 256, 16, load_tokenize(books), 4096)
    return [batch["input_ids"] for batch in samples.batches(16)]


def test_planting_leaves_the_function(books, planted, windows):
    with torch.no_grad():
        easy, hard = (open_checkpoint(m).load()(windows[0][:2]).logits for m in (books, planted))
    assert float((easy - hard).abs().max() / easy.abs().max()) < 1e-5


def test_w4a4_survives_planted_outliers(planted, windows, tmp_path):
    """RTN loses about 3 nats per token on the twin."""
    float_model = open_checkpoint(planted).load()
    artifact = quantize.quantize_model(
        planted, scheme="W4A4", output_dir=tmp_path / "out", group_size=0, seqlen=256, nsamples=64
    )
    scores, base = score_language(artifact.load(), windows, float_model), score_language(float_model, windows).loss
    assert scores.loss - base < 0.020
    assert scores.kl < 0.03


@pytest.mark.parametrize(("scheme", "part"), [("W4A8", 0.98), ("W4A4", 0.95)])
def test_minilm_keeps_its_spearman(scheme, part, minilm, sts, tmp_path):
    artifact = quantize.quantize_model(
        minilm, scheme=scheme, output_dir=tmp_path / "out", group_size=0, nsamples=32, seqlen=128
    )
    for pairs in sts:
        assert evaluate(artifact.directory, pairs, str(minilm))["retained"] >= part
