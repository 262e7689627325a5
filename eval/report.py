"""Measurements and analyses as flat data and as tables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from quantize.artifact.load import read_manifest
from quantize.artifact.writer import PROBE
from quantize.calibration.data import read_samples
from quantize.checkpoint.paths import find_measured, folder_of
from quantize.checkpoint.tokenizer import load_tokenize, load_tokenizer
from quantize.errors import UsageError
from quantize.eval.kurtosis import kurtosis_table
from quantize.eval.loading import load_any
from quantize.eval.masked import score_masked
from quantize.eval.perplexity import score_language
from quantize.eval.similarity import correlation, embed_pairs, read_pairs, score_pairs
from quantize.graph.inputs import example_inputs
from quantize.recipe.recipe import load_recipe
from quantize.scheme.scheme import Engine

BATCH_TOKENS = 4096
ROWS = 16  # rows of a text on which kurtosis is measured


def evaluate(
    directory: str | os.PathLike[str],
    text: str | os.PathLike[str],
    against: str | None = None,
    seqlen: int = 256,
    nsamples: int | None = None,
    engine: Engine = "fake_quant",
    trust_remote_code: bool = False,
    mask_id: int | None = None,
) -> dict[str, Any]:
    """Measure a model or artifact.

    Args:
        directory: an artifact, a float model, a checkpoint of compressed-tensors, or a GGUF file beside its config.
        text: `.txt` or `.jsonl` for a causal language model; `.tsv` rows of score and two sentences for an encoder.
        against: the float model to compare with; None leaves the comparison out.
        seqlen: the number of tokens in a window.
        nsamples: the largest number of windows, which are spread evenly; None takes all.
        engine: how an artifact runs, as in `quantize.load`.
        trust_remote_code: whether code of the models' own may run, as in `quantize.load`.
        mask_id: the token that a masked-diffusion language model has in the place of tokens to find; None takes that
            of the artifact's recipe, if there is one. Such a model is scored on what is masked, a tenth to nine tenths
            of each window.

    Returns:
        A flat dict. A language model has `loss`, `perplexity`, `tokens` (the number predicted) and `bytes`, and with
        `against` also `kl`, `top1`, `loss_against` and `loss_increase`; `leading_tokens` are the special tokens that
        each window begins with, such as `<bos>`, if there are any, and `text_part` says which part of a large text was
        read. An encoder has `spearman` and `bytes`, and with
        `against` also `distance`, `spearman_against` and `retained`.
    """
    directory, text = Path(directory), Path(text)
    model = load_any(directory, engine, trust_remote_code)
    reference = None if against is None else load_any(against, engine, trust_remote_code)
    check_kinds(directory, model, against, reference, text)
    if text.suffix == ".tsv":
        scores = evaluate_pairs(model, reference, directory, text)
    else:
        mask_id = mask_id_of(directory) if mask_id is None else mask_id
        scores = evaluate_language(model, reference, directory, text, seqlen, nsamples, mask_id)
    return scores | {"bytes": stored_bytes(find_measured(directory))}


def kurtosis_report(directory: Path, against: str, text: Path, seqlen: int = 256) -> Table:
    """Return a table of the kurtosis of what quantizers see, before and after, on the first rows of a text.

    Raises:
        UsageError: the directory is no artifact, or text and model do not fit.
    """
    modules = read_manifest(directory)["quantization"]["modules"]
    model, reference = load_any(directory), load_any(against)
    check_kinds(directory, model, against, reference, text)
    if text.suffix == ".tsv":
        sentences = [first for _, first, _ in read_pairs(text)[:ROWS]]
        inputs = dict(load_tokenizer(directory)(sentences, padding=True, truncation=True, return_tensors="pt"))
    else:
        samples = read_samples(text, seqlen, ROWS, load_tokenize(directory), kind_of(model)[1])
        inputs = {"input_ids": samples.batches(ROWS)[0]["input_ids"]}
    return kurtosis_table(model, reference, inputs, modules)


def check_kinds(
    directory: Path, model: nn.Module, against: str | None, reference: nn.Module | None, text: Path
) -> None:
    """Check that the models can be compared and that the text fits them.

    Raises:
        UsageError: the models cannot be compared, or the text does not fit them.
    """
    predicts, pairs, takes = kind_of(model)[0], text.suffix == ".tsv", list(example_inputs(model))
    if takes != ["input_ids"]:
        raise UsageError(
            f"{directory} takes {' and '.join(takes)}; only models that take input_ids alone can be measured"
        )
    if reference is not None and kind_of(model) != kind_of(reference):
        raise UsageError(f"{directory} and {against} cannot be compared: they are of another kind or vocabulary")
    if predicts and pairs:
        raise UsageError(f"{directory} is a language model; give --text FILE.txt or FILE.jsonl")
    if not predicts and not pairs:
        raise UsageError(f"{directory} is no language model; give --text FILE.tsv with scored pairs of sentences")


def kind_of(model: nn.Module) -> tuple[bool, int]:
    """Return whether a model predicts tokens, and how many tokens it knows."""
    if not isinstance(model, PreTrainedModel):
        return False, 0
    return model.get_output_embeddings() is not None, int(model.config.vocab_size)


def stored_bytes(place: Path) -> int:
    """Return the bytes of all weights, in a directory or one file."""
    files = place.glob("*.safetensors") if place.is_dir() else [place]
    return sum(path.stat().st_size for path in files if path.name != PROBE)


def mask_id_of(directory: Path) -> int | None:
    """Return the token that an artifact's calibration data were masked with, if they were."""
    if not (directory / "manifest.json").is_file() or not (directory / "recipe.toml").is_file():
        return None
    found = load_recipe(None, directory / "recipe.toml").calibration
    return None if found is None else found.mask_id


def evaluate_language(
    model: nn.Module,
    reference: nn.Module | None,
    directory: Path,
    text: Path,
    seqlen: int,
    nsamples: int | None,
    mask_id: int | None,
) -> dict[str, Any]:
    """Measure loss and divergence on windows of a text, of what is masked where there is a token for that."""
    vocabulary = kind_of(model)[1]
    if mask_id is not None and mask_id >= vocabulary:
        raise UsageError(f"--mask-id {mask_id} is no token of the model; give an id from 0 to {vocabulary - 1}")
    samples = read_samples(text, seqlen, nsamples, load_tokenize(folder_of(directory)), vocabulary)
    batches = [batch["input_ids"] for batch in samples.batches(BATCH_TOKENS // seqlen or 1)]
    if mask_id is None:
        found = score_language(model, batches, reference)
    else:
        found = score_masked(model, batches, mask_id, reference)
    scores: dict[str, Any] = {"loss": found.loss, "perplexity": found.perplexity, "tokens": found.tokens}
    scores |= {"leading_tokens": samples.leading_text} if samples.leading else {}
    scores |= {"text_part": samples.part_text} if samples.part else {}
    if found.loss_against is not None:
        increase = found.loss - found.loss_against
        scores |= {"kl": found.kl, "top1": found.top1, "loss_against": found.loss_against, "loss_increase": increase}
    return scores


def evaluate_pairs(model: nn.Module, reference: nn.Module | None, directory: Path, text: Path) -> dict[str, Any]:
    """Measure the Spearman correlation on scored pairs of sentences."""
    pairs, tokenizer = read_pairs(text), load_tokenizer(directory)
    if reference is None:
        return {"spearman": score_pairs(model, tokenizer, pairs).spearman, "pairs": len(pairs)}
    expected = embed_pairs(reference, tokenizer, pairs)
    base, found = correlation(expected, pairs), score_pairs(model, tokenizer, pairs, expected)
    scores = {"spearman": found.spearman, "pairs": len(pairs), "distance": found.distance}
    return scores | {"spearman_against": base, "retained": found.spearman / base}


def scores_table(scores: Mapping[str, Any]) -> Table:
    """Return a table with one row for each figure."""
    table = Table("figure", "value")
    for name, value in scores.items():
        shown = f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
        table.add_row(name, shown)
    return table
