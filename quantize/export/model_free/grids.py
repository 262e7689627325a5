"""Weights that lie on a grid already are found by some of their rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from quantize.checkpoint.checkpoint import Checkpoint
from quantize.checkpoint.expert_reader import read_expert
from quantize.export.model_free.forms import ARTIFACT, Form
from quantize.export.model_free.linears import StoredLinear
from quantize.pipeline.grids import FIRST, ROWS, Grid, grid_of, needs
from quantize.scheme.scheme import Scheme


def find_grids(
    form: Form, checkpoint: Checkpoint, linears: list[StoredLinear], schemes: Mapping[str, Scheme]
) -> Iterator[tuple[str, Grid]]:
    """Yield the linears whose weights lie on a grid, by some rows of each; a stack's first matrix tells of the others.

    Of weights that are quantized already, or lie on the hub, one of each shape is looked at.
    """
    known, far = dict[object, Grid | None](), checkpoint.remote is not None
    for linear in linears:
        encoded = checkpoint.is_encoded(linear.weight)
        key = (linear.rows, linear.columns, linear.transposed) if encoded or far else linear.weight
        if key not in known:
            scheme, dtype = schemes[linear.path], checkpoint.dtype_of(linear.weight)
            activations = scheme.activations if form.is_artifact else None
            known[key] = grid_of(some_rows(checkpoint, linear, encoded), scheme.weights, dtype, activations)
        if (grid := known[key]) is not None:
            yield linear.path, grid


def some_rows(checkpoint: Checkpoint, linear: StoredLinear, encoded: bool) -> Tensor:
    """Return some rows of a linear's weight, evenly spread: few of a matrix in a file, as most lie on no grid."""
    name = linear.weight
    if linear.expert is None and linear.experts is None and not encoded and not linear.transposed:
        first = checkpoint.float_rows(name, FIRST)
        return first if linear.rows <= FIRST else checkpoint.float_rows(name, ROWS)
    is_stack = linear.expert is not None or linear.experts is not None
    W = read_expert(checkpoint, name, 0, linear.experts or 1) if is_stack else checkpoint.float_tensor(name)
    W = W.T if linear.transposed else W
    return W[:: max(1, len(W) // ROWS)].contiguous()


def grid_note(form: Form, found: str, grids: Mapping[str, Grid], held: Mapping[str, int], is_kept: bool) -> str:
    """Say on which grid weights lie, and whether they are kept."""
    what = "kept exactly" if is_kept else f"rounded anew{', as the groups do not fit' if held else ''}"
    if held:
        return f"{found}: {what}"
    if not form.is_artifact and any(grid.format for grid in grids.values()):
        return f"{found}, for which {form.name} has no place: {what}; --format {ARTIFACT} keeps it"
    needed = needs(grids)
    keeps = "; a recipe with symmetric = false in [weights] keeps it" if needed.endswith("points") else ""
    return f"{found}, which {needed}: {what}{keeps}"
