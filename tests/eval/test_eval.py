"""Measurements against hand-sized numbers, and on the models whose scores are known."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from quantize import load
from quantize.checkpoint.opening import open_checkpoint
from quantize.errors import UsageError
from quantize.eval import loading
from quantize.eval.perplexity import score_language
from quantize.eval.report import evaluate
from quantize.eval.similarity import embed_pairs, read_pairs, score_pairs


def table_model(rows):
    """Logits that depend on the last token only."""
    table = torch.tensor(rows).log()
    return lambda input_ids: SimpleNamespace(logits=table[input_ids])


def test_scores_by_hand():
    model = table_model([[0.5, 0.5], [0.25, 0.75]])
    reference = table_model([[0.5, 0.5], [0.75, 0.25]])
    scores = score_language(model, [torch.tensor([[0, 1, 1]])], reference)
    kl = 0.75 * math.log(0.75 / 0.25) + 0.25 * math.log(0.25 / 0.75)
    assert scores.tokens == 2
    assert scores.loss == pytest.approx(-(math.log(0.5) + math.log(0.75)) / 2)
    assert scores.kl == pytest.approx(kl / 2)
    assert scores.top1 == 0.5
    assert scores.perplexity == pytest.approx(math.exp(scores.loss))


def test_a_model_does_not_diverge_from_itself(stories, float_stories):
    scores = score_language(float_stories, [torch.arange(64)[None]], open_checkpoint(stories).load())
    assert (scores.kl, scores.top1) == (pytest.approx(0, abs=1e-6), 1.0)


@pytest.mark.slow
def test_minilm_scores_as_published(minilm, sts):
    scores = evaluate(minilm, next(path for path in sts if "images" in path.name))
    assert scores["spearman"] == pytest.approx(0.9304, abs=5e-4)
    assert scores["pairs"] == 750


class OneHot(torch.nn.Module):
    """Hidden states that are the token's unit vector, turned by an angle in the plane of the first two."""

    def __init__(self, angle):
        super().__init__()
        self.turn = torch.eye(8)
        self.turn[:2, :2] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])

    def forward(self, input_ids, **_):
        return SimpleNamespace(last_hidden_state=torch.eye(8)[input_ids] @ self.turn.T)


def letters(sentences, **_):
    """The one letter of each sentence as a token."""
    ids = torch.tensor([["abcdefgh".index(sentence)] for sentence in sentences])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_distance_of_embeddings_by_hand():
    """A turn by 60 degrees leaves a cosine of 1/2 for a and b, and 1 for the other letters."""
    pairs = [(5.0, "a", "a"), (1.0, "a", "c"), (4.0, "b", "b"), (0.0, "d", "b")]
    found = score_pairs(OneHot(math.pi / 3), letters, pairs, embed_pairs(OneHot(0), letters, pairs))
    assert found.distance == pytest.approx(0.5 * 6 / 8)
    assert score_pairs(OneHot(0), letters, pairs).distance is None
    assert found.spearman == pytest.approx(score_pairs(OneHot(0), letters, pairs).spearman)


def test_pairs_without_a_score_are_skipped(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("\tno\tscore\n4.5\ta dog\ta hound\n1\ta dog\ta house\n")
    assert read_pairs(path) == [(4.5, "a dog", "a hound"), (1.0, "a dog", "a house")]
    path.write_text("nothing here\n")
    with pytest.raises(UsageError, match="fewer than two rows of score, sentence and sentence"):
        read_pairs(path)
    path.write_text("high\ta dog\ta hound\n")
    with pytest.raises(UsageError, match="a score that is no finite number"):
        read_pairs(path)


@pytest.mark.parametrize("score", ["nan", "inf", "-Infinity"])
def test_scores_are_finite_numbers(score, tmp_path):
    (tmp_path / "pairs.tsv").write_text(f"1\ta\tb\n{score}\ta\tb\n")
    with pytest.raises(UsageError, match="a score that is no finite number"):
        read_pairs(tmp_path / "pairs.tsv")


def test_pairs_are_bounded(tmp_path):
    with (tmp_path / "pairs.tsv").open("wb") as file:
        file.truncate(10**10)
    with pytest.raises(UsageError, match="has 10000000000 bytes; scored pairs may take 16777216"):
        read_pairs(tmp_path / "pairs.tsv")


def test_an_encoder_needs_pairs(minilm, books_heldout):
    with pytest.raises(UsageError, match=r"no language model; give --text FILE\.tsv"):
        evaluate(minilm, books_heldout)


def test_a_language_model_ranks_no_pairs(stories, sts):
    with pytest.raises(UsageError, match="is a language model; give --text FILE"):
        evaluate(stories, sts[0])


def test_the_float_model_must_be_of_the_same_kind(stories, books, minilm, stories_dev, sts):
    for model, other, text in (
        (stories, books, stories_dev),
        (stories, minilm, stories_dev),
        (minilm, stories, sts[0]),
    ):
        with pytest.raises(UsageError, match="cannot be compared"):
            evaluate(model, text, str(other))


@pytest.mark.parametrize("engine", ["fake_quant", "reference"])
def test_eval_takes_an_engine(artifact_one_layer, stories_dev, cli, monkeypatch, engine):
    loaded = []
    monkeypatch.setattr(loading, "load", lambda *a, **k: loaded.append(k) or load(*a, **k))
    arguments = ("--text", stories_dev, "--nsamples", 2, "--seqlen", 16, "--json")
    chosen = ("--engine", engine) if engine == "reference" else ()
    found = cli("eval", artifact_one_layer.directory, *arguments, *chosen)
    assert found.code == 0
    assert json.loads(found.out)["tokens"] == 30
    assert [given["engine"] for given in loaded] == [engine]
