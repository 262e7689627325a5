"""A file of the result is written some rows at a time, so that no more than one matrix is in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quantize.artifact.writer import ArtifactWriter, translate_disk_errors
from quantize.checkpoint.checkpoint import Checkpoint
from quantize.checkpoint.files_seen import sha256
from quantize.checkpoint.safetensors_writer import RowWriter
from quantize.checkpoint.tensor_files import require_finite
from quantize.export.compressed_tensors.format import WORD, is_packed, stored
from quantize.export.compressed_tensors.model_free.linears import StoredLinear
from quantize.export.compressed_tensors.model_free.plan import ModelFreePlan
from quantize.formats.qtensor import QTensor
from quantize.quantizers.grid import on_grid

PIECE = 1 << 18  # numbers of a weight that are rounded together, so that they stay in a core's cache


def write_file(plan: ModelFreePlan, writer: ArtifactWriter, file: str, names: list[str]) -> dict[str, Any]:
    """Write a file of the result, and wait until it is on disk.

    Args:
        plan: the plan.
        writer: the writer of the result.
        file: the name of the file.
        names: the tensors that it is made of.

    Returns:
        Its SHA-256, the names of its tensors, and the paths of the linears that were kept as they were.
    """
    tensors = {name: x for source in names for name, x in plan.tensors(source).items()}
    kept, path = list[str](), writer.directory / file
    with translate_disk_errors(writer.output), RowWriter(path, tensors) as out:
        for name in names:
            if name in plan.linears:
                kept += write_weight(plan, out, name)
            else:
                for first, rows in pieces(plan.checkpoint, name):
                    out.put(name, first, rows)
    return {"sha256": sha256(path), "tensors": [*tensors], "kept": kept}


def write_weight(plan: ModelFreePlan, out: RowWriter, name: str) -> list[str]:
    """Round the linears of a weight or of a stack, and write them; return those that were kept as they were."""
    checkpoint, kept, dtype = plan.checkpoint, list[str](), plan.dtype(name)
    whole = checkpoint.float_tensor(name) if checkpoint.is_encoded(name) else None
    for linear in plan.linears[name]:
        scheme = plan.schemes[linear.path]
        W = matrix(checkpoint, linear, whole)
        if linear.path in plan.kept:
            W = checkpoint.float_tensor(name) if W is None else W.float()
            if (weight := on_grid(W, scheme.weights, dtype)) is not None:
                kept.append(linear.path)
                put(out, linear, 0, weight, is_packed(scheme))
                continue
        for first, rows in pieces(checkpoint, name) if W is None else split(W):
            weight = plan.quantizer.quantize(rows.float(), scheme.weights, None, dtype)
            put(out, linear, first, weight, is_packed(scheme))
    return kept


def matrix(checkpoint: Checkpoint, linear: StoredLinear, whole: Tensor | None) -> Tensor | None:
    """Return the weight [N, K] of a linear; None if it is a tensor in a file, which can be read in pieces.

    `whole` is the tensor that holds it, if it has been put together already.
    """
    if linear.expert is None:
        return whole
    stacked = checkpoint.read_part(linear.weight, linear.expert, 1)[0] if whole is None else whole[linear.expert]
    W = (stacked.T if linear.transposed else stacked)[linear.first : linear.first + linear.rows]
    return require_finite(linear.weight, W.contiguous())


def pieces(checkpoint: Checkpoint, name: str) -> Iterator[tuple[int, Tensor]]:
    """Yield a tensor in pieces, each with its first row, read from its file as it is stored if it lies there whole."""
    if checkpoint.is_encoded(name):
        yield from split(checkpoint.tensor(name))
    elif shape := checkpoint.read_shape(name):
        count = rows_of(shape)
        for first in range(0, shape[0], count):
            yield first, require_finite(name, checkpoint.read_part(name, first, count))
    else:
        yield 0, require_finite(name, checkpoint.read_part(name).reshape(1))


def split(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield a tensor in pieces, each with its first row."""
    count = rows_of(x.shape)
    yield from zip(range(0, len(x), count), x.split(count), strict=True)


def rows_of(shape: tuple[int, ...]) -> int:
    """Return how many rows a piece has: a multiple of those whose zero points share a word."""
    return max(1, PIECE * shape[0] // max(1, math.prod(shape)) // WORD) * WORD


def put(out: RowWriter, linear: StoredLinear, first: int, weight: QTensor, packed: bool) -> None:
    """Write some rows of a rounded weight, from row `first` on, into their places in the file."""
    for part, x in stored(weight, packed).items():
        name = f"{linear.path}.{part}"
        if part == "weight_shape":
            out.put(name, 0, torch.tensor([linear.rows, linear.columns]))
        else:
            out.put(name, first // WORD if part == "weight_zero_point" and packed else first, x)
