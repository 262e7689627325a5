"""A planted twin is a copy of a model that computes the same function and is harder to quantize."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from quantize.artifact.float_model import save_float_model
from quantize.artifact.writer import ArtifactWriter
from quantize.checkpoint.opening import open_checkpoint
from quantize.errors import UsageError
from quantize.graph.allowed_transforms import AllowedTransforms
from quantize.graph.analysis import find_bases
from quantize.graph.basis import Basis
from quantize.graph.export import export_program
from quantize.transforms.fold import Diagonal, fold

FACTOR = 30.0  # the factor by which planted channels are scaled


def plant(model: Path, output: Path) -> None:
    """Scale two channels of every diagonal basis up in what writes it and down in what reads it.

    On norm gains this makes channel outliers, and on the gated inputs of a linear token-sparse ones. RTN breaks on
    both, while the float logits stay as they are. The twin is stored in float32, which holds every factor exactly.

    Args:
        model: the directory of a float model.
        output: the new directory.

    Raises:
        UsageError: the model has no diagonal basis, or the output exists.
    """
    bases = diagonal_bases(model)
    chosen = [b for b in bases if len(b.readers) > 1 or not b.writers[0].vector]  # not the norm of the head
    scale(model, output, chosen, FACTOR, 2)


def plant_keys(model: Path, output: Path) -> None:
    """Scale four channels of all keys up and those of the queries down, which leaves the scores as they are.

    If positions rotate pairs of channels, a channel here is such a pair. The arguments are those of `plant`.

    Raises:
        UsageError: no queries and keys of the model can be scaled, or the output exists.
    """
    chosen = [b for b in diagonal_bases(model) if any(edge.dual for edge in b.readers)]
    scale(model, output, chosen, 1 / FACTOR, 4)  # the basis is that of the queries


def diagonal_bases(model: Path) -> list[Basis]:
    """Return the bases whose channels can be scaled one by one but not rotated."""
    bases = find_bases(export_program(open_checkpoint(model).skeleton())).all
    legal = (
        b for b in bases if AllowedTransforms.DIAGONAL in b.allowed and AllowedTransforms.ORTHOGONAL not in b.allowed
    )
    return [b for b in legal if b.writers and b.readers]


def scale(model: Path, output: Path, chosen: list[Basis], factor: float, channels: int) -> None:
    """Write the twin with a few channels of each basis scaled."""
    if not chosen:
        raise UsageError(f"{model} has no basis in which outliers could be planted")
    checkpoint = open_checkpoint(model)
    names = [name for name, _ in checkpoint.skeleton().named_parameters()]
    weights = {name: checkpoint.tensor(name).float() for name in names}
    rng = np.random.default_rng(0)
    for basis in chosen:
        weights |= fold(basis, outliers(basis, factor, channels, rng), weights)
    with ArtifactWriter(output) as writer:
        save_float_model(checkpoint, writer, weights)


def outliers(basis: Basis, factor: float, channels: int, rng: np.random.Generator) -> Diagonal:
    """Return `factor` on a few random channels and 1 elsewhere."""
    d = torch.ones(basis.dim, dtype=torch.float64)
    d[torch.from_numpy(rng.choice(basis.dim, channels, replace=False))] = factor
    return Diagonal(d)
