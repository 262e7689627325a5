"""A file of the result is written some rows at a time, so that no more than one matrix is in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantize.checkpoint.checkpoint import Checkpoint
from quantize.checkpoint.expert_reader import read_expert
from quantize.checkpoint.files_seen import sha256
from quantize.checkpoint.safetensors_writer import RowWriter
from quantize.checkpoint.tensor_files import require_finite
from quantize.export.compressed_tensors.format import WORD, WORD_BITS
from quantize.export.model_free.linears import StoredLinear
from quantize.export.model_free.plan import GLOBAL_SCALE, SHAPE, ModelFreePlan
from quantize.formats import get_format
from quantize.formats.qtensor import QTensor
from quantize.quantizers.grid import on_grid

PIECE = 1 << 18  # numbers of a weight that are rounded together, so that they stay in a core's cache


def write_file(plan: ModelFreePlan, directory: Path, file: str, names: list[str]) -> dict[str, Any]:
    """Write a file of the result, and wait until it is on disk.

    Args:
        plan: the plan.
        directory: where the file is written.
        file: the name of the file.
        names: the tensors that it is made of.

    Returns:
        Its SHA-256, the names of its tensors, and the paths of the linears that were kept as they were.
    """
    tensors = {name: x for source in names for name, x in plan.tensors(source).items()}
    kept, path = list[str](), directory / file
    with RowWriter(path, tensors) as out:
        for name in names:
            if name in plan.linears:
                kept += write_weight(plan, out, name)
            else:
                for first, rows in pieces(plan.checkpoint, name):
                    out.put(name, first, rows)
    return {"sha256": sha256(path), "tensors": [*tensors], "kept": kept}


def write_weight(plan: ModelFreePlan, out: RowWriter, name: str) -> list[str]:
    """Round the linears of a weight or of a stack, and write them; return those that were kept as they were."""
    kept, whole = list[str](), whole_tensor(plan.checkpoint, name)
    for linear in plan.linears[name]:
        found = matrices(plan.checkpoint, linear, whole)
        if all([write_matrix(plan, out, linear, first, W) for first, W in found]):
            kept.append(linear.path)
    return kept


def write_matrix(plan: ModelFreePlan, out: RowWriter, linear: StoredLinear, row: int, W: Tensor | None) -> bool:
    """Round a matrix, or the tensor in the file if it is None, and write it from row `row` of the result on.

    Returns:
        Whether it was kept as it was.
    """
    scheme, name, dtype = plan.schemes[linear.path], linear.weight, plan.dtype(linear.weight)
    if linear.path in plan.kept:
        W = plan.checkpoint.float_tensor(name) if W is None else W.float()
        if (weight := on_grid(W, scheme.weights, dtype)) is not None:
            put(plan, out, linear, row, weight)
            return True
    once = get_format(scheme.weights.format).has_global_scale
    if W is None and once:
        W = plan.checkpoint.float_tensor(name)
    for first, rows in pieces(plan.checkpoint, name) if W is None else [(0, W)] if once else split(W):
        weight = plan.quantizer.quantize(rows.float(), scheme.weights, None, dtype)
        put(plan, out, linear, row + first, weight)
    return False


def whole_tensor(checkpoint: Checkpoint, name: str) -> Tensor | None:
    """Return a tensor that is made of parts and can only be put together as a whole; None for others."""
    source = checkpoint.sources[name]
    return checkpoint.float_tensor(name) if checkpoint.is_encoded(name) and source.converter is None else None


def matrices(checkpoint: Checkpoint, linear: StoredLinear, whole: Tensor | None) -> Iterator[tuple[int, Tensor | None]]:
    """Yield the matrices [N, K] of a linear, each with its first row; None for a tensor that can be read in pieces.

    Args:
        checkpoint: the files.
        linear: the linear.
        whole: the tensor that holds it, if it has been put together already.
    """
    for at, number in enumerate(range(linear.experts) if linear.experts is not None else [linear.expert]):
        yield at * linear.rows, matrix(checkpoint, linear, number, whole)


def matrix(checkpoint: Checkpoint, linear: StoredLinear, number: int | None, whole: Tensor | None) -> Tensor | None:
    """Return one matrix [N, K] of a linear, as `matrices` yields it; `number` is that of the expert."""
    name = linear.weight
    if number is None:
        in_pieces = whole is None and not linear.transposed and is_whole(checkpoint, name)
        W = None if in_pieces else checkpoint.float_tensor(name) if whole is None else whole
        W = W.T if W is not None and linear.transposed else W
        return W if W is None else require_finite(name, W.contiguous())
    stacked = read_expert(checkpoint, name, number, linear.experts or 1) if whole is None else whole[number]
    W = (stacked.T if linear.transposed else stacked)[linear.first : linear.first + linear.rows]
    return require_finite(name, W.contiguous())


def is_whole(checkpoint: Checkpoint, name: str) -> bool:
    """Return whether a tensor lies in a file as it is."""
    source = checkpoint.stored(name)
    return source is not None and source.converter is None


def pieces(checkpoint: Checkpoint, name: str) -> Iterator[tuple[int, Tensor]]:
    """Yield a tensor in pieces, each with its first row, read from its file as it is stored if it lies there whole."""
    if not is_whole(checkpoint, name):
        found = require_finite(name, checkpoint.tensor(name))
        yield from split(found if found.dim() else found.reshape(1))
        return
    stored = checkpoint.sources[name].names[0]
    if shape := checkpoint.read_shape(stored):
        count = rows_of(shape)
        for first in range(0, shape[0], count):
            yield first, require_finite(name, checkpoint.read_part(stored, first, count))
    else:
        yield 0, require_finite(name, checkpoint.read_part(stored).reshape(1))


def split(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield a tensor in pieces, each with its first row."""
    count = rows_of(x.shape)
    yield from zip(range(0, len(x), count), x.split(count), strict=True)


def rows_of(shape: tuple[int, ...]) -> int:
    """Return how many rows a piece has: a multiple of those whose zero points share a word."""
    return max(1, PIECE * shape[0] // max(1, math.prod(shape)) // WORD) * WORD


def put(plan: ModelFreePlan, out: RowWriter, linear: StoredLinear, first: int, weight: QTensor) -> None:
    """Write some rows of a rounded weight, from row `first` on, into their places in the file."""
    for part, x in plan.form.parts(weight, plan.schemes[linear.path]).items():
        name = f"{linear.path}.{part}"
        if part == SHAPE:
            out.put(name, 0, torch.tensor([linear.rows, linear.columns]))
        elif part == GLOBAL_SCALE:  # each expert of a stack has one of its own, in all of its rows
            rows = len(weight.data) if linear.experts is not None else 1
            out.put(name, first if linear.experts is not None else 0, x.reshape(1, 1).expand(rows, 1))
        else:
            in_words = part == "weight_zero_point" and x.dtype == torch.int32
            out.put(name, first * weight.args.num_bits // WORD_BITS if in_words else first, x)
