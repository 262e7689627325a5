"""`python -m benchmarks.activation_rounding MODEL` rounds a language model's activations alone, to 8, 6 and 4 bits.

Weights stay in floating point, behind Hadamard transforms, so that what is lost is what remains at such a width when
nothing is lost by weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from benchmarks.models.bench import TEXT
from benchmarks.models.windows import read_windows
from quantize.checkpoint.opening import open_checkpoint
from quantize.eval.perplexity import score_language
from quantize.formats.fake_quantize import fake_quantize
from quantize.scheme.scheme import ActivationArgs
from quantize.transforms.online import hadamard

WIDTHS = (
    ActivationArgs(num_bits=8, symmetric=False),
    ActivationArgs(num_bits=6, symmetric=False),
    ActivationArgs(num_bits=4, symmetric=False, clip_ratio=0.95),  # W4A4's, before its pass searches for better ones
)


def rounded(directory: Path, args: ActivationArgs | None) -> nn.Module:
    """Load a model whose linears, but the one that scores the vocabulary, round their rotated inputs."""
    model: Any = open_checkpoint(directory).load()
    head = model.get_output_embeddings()
    for linear in (x for x in model.modules() if isinstance(x, nn.Linear) and x is not head):
        rotate_and_round(linear, args)
    return model  # type: ignore[no-any-return]


def rotate_and_round(linear: nn.Linear, args: ActivationArgs | None) -> None:
    """Rotate a linear's weight, and from now on rotate and round its inputs."""
    H = hadamard(linear.in_features)
    linear.weight.data = H(linear.weight.data)

    def front(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (fake_quantize(H(given[0]), args),)

    linear.register_forward_pre_hook(front)


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@torch.no_grad()
def main(model: Path) -> None:
    """Print the loss increase, the KL and the agreement of each width."""
    windows, floats = read_windows(model, TEXT), open_checkpoint(model).load()
    base = score_language(floats, windows).loss
    for args in WIDTHS:
        found = score_language(rounded(model, args), windows, floats)
        told = f"loss {found.loss - base:+.4f}, KL {found.kl:.4f}, top-1 {found.top1:.3f}"
        click.echo(f"activations of {args.num_bits} bits: {told}")


if __name__ == "__main__":
    main()
