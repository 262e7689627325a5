"""Outliers of several kinds are planted where the model's own activations say; the twins compute the same function."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from quantize.artifact.float_model import save_float_model
from quantize.artifact.writer import ArtifactWriter
from quantize.calibration.runner import SequentialRunner
from quantize.calibration.tensor_samples import read_calibration
from quantize.checkpoint.opening import open_checkpoint
from quantize.checkpoint.tokenizer import load_tokenize
from quantize.errors import UsageError
from quantize.eval.planted_outliers import FACTOR
from quantize.graph.allowed_transforms import AllowedTransforms
from quantize.graph.analysis import find_bases
from quantize.graph.basis import Basis
from quantize.graph.export import export_program
from quantize.graph.inputs import example_inputs
from quantize.graph.interpreter import Overrides
from quantize.graph.program import Program
from quantize.transforms.fold import Diagonal, fold

Kind = Literal["channel", "token_sparse", "two_spike"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WINDOWS, WINDOW = 8, 256
HEIGHT = 100.0  # the height of planted spikes, in root mean squares of the input


def plant_kind(model: Path, output: Path, kind: Kind) -> None:
    """Write a twin with outliers of one kind in every block.

    channel: two channels of each norm gain × `FACTOR`, so in every token (of values where no gain can be folded).
    token_sparse: the two channels of each gated input (of values, where none is gated) with the highest peak for their
        root mean square × `FACTOR`, so in few tokens.
    two_spike: at the token with the highest peak of the same inputs, its two largest channels scaled to the same
        height, `HEIGHT` root mean squares of the input.

    Args:
        model: the directory of a float model that takes token ids.
        output: the new directory.
        kind: the kind of outliers.

    Raises:
        UsageError: the model has no basis in which outliers could be planted, or the output exists.
    """
    checkpoint = open_checkpoint(model)
    skeleton = checkpoint.skeleton()
    names, inputs = [name for name, _ in skeleton.named_parameters()], example_inputs(skeleton)
    program = export_program(skeleton)
    weights = {name: checkpoint.tensor(name).float() for name in program.parameters.values()}
    bases = chosen(find_bases(program).all, gains=kind == "channel")
    if not bases:
        raise UsageError(f"{model} has no basis in which outliers could be planted")
    samples = read_calibration(None, inputs, WINDOW, WINDOWS, load_tokenize(model), program.vocabulary)
    seen = inputs_of(program, weights, [row["input_ids"] for row in samples.batches(WINDOWS)])
    for basis in bases:
        weights |= fold(basis, Diagonal(spike_factors(channels_of(basis, seen), kind)), weights)
    with ArtifactWriter(output) as writer:  # without the second names of tied parameters
        save_float_model(checkpoint, writer, {name: weights[name] for name in names})


def chosen(bases: tuple[Basis, ...], gains: bool) -> list[Basis]:
    """Return the diagonal bases that linears read, written by gains or not; if not, gated inputs come before values."""
    found = [b for b in bases if AllowedTransforms.DIAGONAL in b.allowed and b.writers and b.readers]
    found = [b for b in found if not any(e.dual or e.vector for e in b.readers)]
    by_gains = [b for b in found if b.gain and len(b.readers) > 1]
    by_linears = [b for b in found if not b.gain]
    gated = [b for b in by_linears if AllowedTransforms.ORTHOGONAL not in b.allowed]
    return by_gains if gains and by_gains else gated or by_linears


def inputs_of(program: Program, weights: dict[str, Tensor], batches: list[Tensor]) -> dict[str, Tensor]:
    """Return the input [tokens, K] of each linear, by the name of its weight."""
    runner, seen = SequentialRunner(program, batches), dict[str, Tensor]()
    for segment in program.segments:
        for sharing in runner.advance_to_linears(segment, Overrides(weights), program.linears(segment)):
            rows = torch.cat([values[sharing[0].source].flatten(0, -2) for values in runner.values])
            seen |= {linear.weight: rows for linear in sharing}
    return seen


def channels_of(basis: Basis, seen: dict[str, Tensor]) -> Tensor:
    """Return the channels of a basis as its first reader sees them, [tokens, dim]; of several copies the largest."""
    edge = basis.readers[0]
    return torch.stack([seen[edge.parameter][:, index].abs() for index in edge.index]).amax(dim=0)


def spike_factors(X: Tensor, kind: Kind) -> Tensor:
    """Return the factor of each channel of |X| [tokens, dim], float64 [dim]."""
    d = torch.ones(X.shape[1], dtype=torch.float64)
    if kind == "two_spike":
        row = X[X.amax(dim=1).argmax()].double()
        two = row.topk(2).indices
        d[two] = HEIGHT * float(X.square().mean().sqrt()) / row[two]
    elif kind == "token_sparse":
        d[(X.amax(0) / X.square().mean(0).sqrt().clamp(min=1e-9)).topk(2).indices] = FACTOR
    else:
        d[torch.randperm(len(d), generator=torch.Generator().manual_seed(len(d)))[:2]] = FACTOR
    return d
