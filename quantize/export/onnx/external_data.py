"""Weights that are too large for one file, or that several models share, are stored in files of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx_ir
from onnx_ir.external_data import convert_tensors_to_external

LARGE = 3 << 29  # bytes of weights above which they get a file of their own, because one file holds at most 2 GiB
SMALL = 256  # bytes up to which a weight stays in its model's file
SHARED = "shared.onnx.data"


def save(models: Mapping[str, onnx_ir.Model], directory: Path, large: int = LARGE) -> None:
    """Write models under their names; afterwards their weights are read from the written files.

    Weights that several models share, such as tied embeddings, go to `shared.onnx.data`. If a model has more than
    `large` bytes of other weights, these go to NAME.data.
    """
    if alike := shared_initializers(list(models.values())):
        externalize(alike, directory, SHARED)
    for name, model in models.items():
        own = [value for value in weights(model) if not isinstance(value.const_value, onnx_ir.ExternalTensor)]
        if sum(value.const_value.nbytes for value in own if value.const_value) > large:
            externalize([[value] for value in own], directory, f"{name}.data")
        onnx_ir.save(model, directory / name)


def weights(model: onnx_ir.Model) -> Iterator[onnx_ir.Value]:
    """Yield the weights of all graphs of a model that are not small."""
    held = (value for graph in model.graphs() for value in graph.initializers.values())
    return (value for value in held if value.const_value is not None and value.const_value.nbytes > SMALL)


def shared_initializers(models: Sequence[onnx_ir.Model]) -> list[list[onnx_ir.Value]]:
    """Return lists of weights that have the same dtype, shape and bytes in several models."""
    groups: dict[object, list[tuple[int, onnx_ir.Value]]] = {}
    for number, model in enumerate(models if len(models) > 1 else ()):
        for value in weights(model):
            groups.setdefault(content(value.const_value), []).append((number, value))
    return [[value for _, value in group] for group in groups.values() if len({number for number, _ in group}) > 1]


def content(tensor: onnx_ir.TensorProtocol | None) -> object:
    """Return a key that is equal exactly for equal weights."""
    assert tensor is not None
    return tensor.dtype, tuple(tensor.shape.numpy()), hashlib.sha256(tensor.tobytes()).digest()


def externalize(groups: Sequence[Sequence[onnx_ir.Value]], directory: Path, file: str) -> None:
    """Write one of each list of equal weights into a file, and let the others refer to it."""
    written = convert_tensors_to_external([group[0].const_value for group in groups], directory, file)
    for group, at in zip(groups, written, strict=True):
        for value in group:
            value.const_value = onnx_ir.ExternalTensor(
                file, at.offset, at.length, at.dtype, shape=at.shape, name=str(value.name), base_dir=directory
            )
