"""One cell of `bench_models` runs in a process of its own, and so has its own peak of memory; it prints JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.models.cells import FLOAT, ROOT, Cell, changes
from quantize.checkpoint.opening import open_checkpoint
from quantize.checkpoint.tokenizer import load_tokenizer
from quantize.eval.divergence import SentenceJudge
from quantize.eval.perplexity import score_language
from quantize.eval.report import stored_bytes
from quantize.pipeline.estimate.peak_memory import peak_memory
from quantize.pipeline.quantize import quantize_model

NEW_TOKENS = 24
Scores = dict[str, dict[str, Any]]


def measure(cell: Cell, model: Path, data: Path, output: Path) -> dict[str, Any]:
    """Quantize a model, and score what was written.

    Args:
        cell: the scheme and the recipe.
        model: the float model.
        data: where `windows` wrote calibration.jsonl, and evaluation.json for a language model.
        output: the artifact's directory.

    Returns:
        `seconds` of processor time and `peak_mb` of the run, without those of the scores; `artifact_mb`; `texts`, the
        scores on each; and a language model's `continuation` of the prompt.
    """
    if cell.scheme == FLOAT:
        found, reference, quantized = {"artifact_mb": stored_bytes(model) / 1e6}, None, open_checkpoint(model).load()
    else:
        start = time.process_time()
        nsamples, seqlen = windows_of(data / "calibration.jsonl")
        artifact = quantize_model(model, output_dir=output, scheme=cell.scheme, recipe=changes(cell),
                                  calibration=data / "calibration.jsonl", nsamples=nsamples, seqlen=seqlen)  # fmt: skip
        found = {"seconds": time.process_time() - start, "peak_mb": peak_memory() / 1e6}
        found["artifact_mb"] = stored_bytes(artifact.directory) / 1e6
        reference, quantized = open_checkpoint(model).load(), artifact.load()
    if not (data / "evaluation.json").is_file():
        return found | {"texts": sentence_scores(model, None if reference is None else quantized)}
    evaluation = json.loads((data / "evaluation.json").read_text())
    texts = {name: language_scores(quantized, ids, reference) for name, ids in evaluation["texts"].items()}
    return found | {"texts": texts, "continuation": continuation(quantized, model, evaluation["prompt"])}


def windows_of(calibration: Path) -> tuple[int, int]:
    """Return the number of calibration windows and of tokens in each."""
    rows = [json.loads(line)["input_ids"] for line in calibration.read_text().splitlines()]
    return len(rows), max(map(len, rows))


def language_scores(model: nn.Module, ids: list[list[int]], reference: nn.Module | None) -> dict[str, Any]:
    """Return `loss`, and `kl` and `top1` against the float model, window by window: all logits together are large."""
    found = score_language(model, [torch.tensor([row]) for row in ids], reference)
    return {"loss": found.loss} | ({} if reference is None else {"kl": found.kl, "top1": found.top1})


def sentence_scores(model: Path, quantized: nn.Module | None) -> Scores:
    """Return the scores on every file of scored pairs; those of the float model itself if there is no other."""
    found: Scores = {}
    for pairs in sorted((ROOT / "tests" / "data" / "sts").glob("*.tsv")):
        judge = SentenceJudge(model, pairs)
        found[pairs.stem] = {"spearman": judge.base} if quantized is None else judge.scores(quantized)
    return found


@torch.no_grad()
def continuation(model: Any, directory: Path, prompt: list[int]) -> str:
    """Return what a language model writes after a prompt when it always takes the likeliest token."""
    ids = torch.tensor([prompt])
    written = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
    text: str = load_tokenizer(directory).decode(written[0, len(prompt) :], skip_special_tokens=True)
    return text


def main(name: str, scheme: str, recipe: str, model: str, data: str, output: str) -> None:
    """Measure one cell and print its figures."""
    print(json.dumps(measure(Cell(name, scheme, recipe), Path(model), Path(data), Path(output))))


if __name__ == "__main__":
    main(*sys.argv[1:])
