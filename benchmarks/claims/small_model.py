"""A small real model and its text, on which claims are measured that synthetic data cannot decide."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from quantize.calibration.data import BUNDLED, read_samples
from quantize.checkpoint.tokenizer import load_tokenize
from quantize.eval.bit_flips import linears
from quantize.eval.loading import load_any
from quantize.eval.perplexity import score_language
from quantize.kernels.ops import dequantize, quantize_per_token

TESTS = Path(__file__).resolve().parents[2] / "tests"
BOOKS, TEXT = TESTS / "models" / "books-llama-6m", TESTS / "data" / "books" / "heldout.txt"
WINDOW = 256


@functools.cache
def load(directory: Path) -> nn.Module:
    """Load a float model; whoever changes it changes it back."""
    return load_any(directory)


@functools.cache
def windows(directory: Path = BOOKS, text: Path = TEXT, count: int = 2) -> list[Tensor]:
    """Return windows of a text as one batch of token ids [count, 256]."""
    samples = read_samples(text, WINDOW, count, load_tokenize(directory), 2**31)
    return [batch["input_ids"] for batch in samples.batches(count)]


@functools.cache
def weights(directory: Path = BOOKS) -> dict[str, Tensor]:
    """Return the weights [N, K] of the linears inside of the blocks by path."""
    model = load(directory)
    return {path: model.get_parameter(f"{path}.weight").data for path in linears(model)}


@functools.cache
@torch.no_grad()
def inputs(directory: Path = BOOKS, rows: int = 256) -> dict[str, Tensor]:
    """Return rows [rows, K] of the input of each linear on two windows of the bundled prose."""
    model, found = load(directory), dict[str, Tensor]()
    with ExitStack() as hooks:
        for path in weights(directory):
            hook = model.get_submodule(path).register_forward_pre_hook(
                lambda _, x, path=path: found.update({path: x[0].flatten(0, -2)[:: 2 * WINDOW // rows]})
            )
            hooks.enter_context(hook)
        score_language(model, windows(directory, BUNDLED))
    return found


def loss(directory: Path = BOOKS, count: int = 2) -> float:
    """Return the loss of the model as it is now, in nats per token of the held-out text."""
    return score_language(load(directory), windows(directory, count=count)).loss


@contextmanager
def replaced(changed: Mapping[str, Tensor], directory: Path = BOOKS) -> Iterator[None]:
    """Give linears other weights until the `with` block ends."""
    held = weights(directory)
    kept = {path: held[path].clone() for path in changed}
    try:
        for path, W in changed.items():
            held[path].copy_(W)
        yield
    finally:
        for path, W in kept.items():
            held[path].copy_(W)


def rounded(W: Tensor, bits: int) -> Tensor:
    """Round each row of W [N, K] to integers up to its largest magnitude."""
    return dequantize(*quantize_per_token(W, bits, symmetric=True))
