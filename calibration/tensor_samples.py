"""Samples of inputs of any kind come from a file of tensors; the model decides which kind of file it needs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from quantize.calibration.data import BUNDLED, Row, Samples, check_ids, read_samples, spread
from quantize.checkpoint.files_seen import stamp
from quantize.checkpoint.safetensors_reader import read_header, read_rows
from quantize.checkpoint.tokenizer import Tokenize
from quantize.errors import ChangedError, QuantizeError, UsageError
from quantize.graph.inputs import Input

Stamped = tuple[Mapping[str, Tensor], str]  # the tensors of a file, and its SHA-256
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def read_calibration(
    path: Path | None,
    inputs: Mapping[str, Input],
    seqlen: int,
    limit: int,
    tokenize: Tokenize | None,
    vocabulary: int,
    stamped: Stamped | None = None,
) -> Samples:
    """Read the samples for a model; without a file they are windows of the bundled prose.

    Args:
        path: a `.safetensors` file; for a model that takes token ids alone also a `.txt` or `.jsonl` file.
        inputs: the inputs that the model takes.
        seqlen, limit, tokenize, vocabulary: as in `read_samples`.
        stamped: what `read_stamped` returned for a `.safetensors` file, if it has been read already.

    Raises:
        UsageError: there is no such file, or it does not hold what the model takes.
        QuantizeError: the file is damaged, or holds too little.
    """
    if path is not None and path.suffix == ".safetensors":
        return read_tensors(path, inputs, seqlen, limit, vocabulary, stamped)
    name, *more = inputs
    if more or inputs[name].example.is_floating_point():
        raise UsageError(f"the model takes {described(inputs)}; give a --calibration FILE.safetensors that holds this")
    return read_samples(path or BUNDLED, seqlen, limit, tokenize, vocabulary, name)


def read_tensors(
    path: Path,
    inputs: Mapping[str, Input],
    seqlen: int,
    limit: int,
    vocabulary: int,
    stamped: Stamped | None = None,
) -> Samples:
    """Read samples from a tensor of each input's name, whose first axis is the samples; ids are cut to `seqlen`.

    Raises:
        UsageError: there is no such file, or it does not hold what the model takes.
        QuantizeError: the file is damaged, or holds numbers that are not finite.
    """
    tensors, digest = stamped or read_stamped(path)
    check_shapes(path, tensors, inputs)
    check_values(path, tensors, vocabulary)
    chosen = spread(range(len(tensors[next(iter(inputs))])), limit)
    rows = ({name: sample(tensors[name][i], seqlen) for name in inputs} for i in chosen)
    return Samples(tuple(rows), digest)


def read_stamped(path: Path) -> Stamped:
    """Return all tensors of a file, and the file's SHA-256 in hex; it is read once.

    Raises:
        UsageError: there is no such file.
        QuantizeError: the file is damaged.
        ChangedError: it has changed on the way.
    """
    if not path.is_file():
        raise UsageError(f"no such calibration file: {path}")
    before, tensors, digest = stamp(path), dict[str, Tensor](), hashlib.sha256()
    header = read_header(path)
    with path.open("rb") as file:
        digest.update(file.read(header.start))
    for name in sorted(header.entries, key=lambda name: header.entries[name].data_offsets):  # which follow one another
        tensors[name] = read_rows(path, name)
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    if stamp(path) != before:
        raise ChangedError(f"{path} has changed while it was read; start again with a file that stays as it is")
    return {name: tensors[name] for name in header.entries}, digest.hexdigest()


def sha256_of(rows: Iterable[Row]) -> str:
    """Return the SHA-256 of samples, in hex."""
    digest = hashlib.sha256()
    for row in rows:
        for name, x in row.items():
            digest.update(f"{name} {x.dtype} {list(x.shape)}\n".encode())
            digest.update(x.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sample(tensor: Tensor, seqlen: int) -> Tensor:
    """Return one sample of one input: all of it in float32, or the first `seqlen` ids."""
    return tensor.float() if tensor.is_floating_point() else tensor[:seqlen].long()


def check_shapes(path: Path | str, tensors: Mapping[str, Tensor], inputs: Mapping[str, Input]) -> None:
    """Check that there is a tensor of the right shape for each input and nothing else, all with as many samples."""
    takes = f"the model takes {described(inputs)}"
    for name in sorted(tensors.keys() ^ inputs.keys()):
        raise UsageError(f"{path} holds {'no' if name in inputs else 'a tensor'} {name}; {takes}")
    for name, wanted in inputs.items():
        if not fits(tensors[name], wanted):
            raise UsageError(f"{path} holds {name} {list(tensors[name].shape)} of {tensors[name].dtype}; {takes}")
    if len({len(tensor) for tensor in tensors.values()}) > 1:
        counts = " and ".join(f"{len(tensors[name])} of {name}" for name in inputs)
        raise UsageError(f"{path} holds unequal numbers of samples, {counts}; give as many of each")


def fits(tensor: Tensor, wanted: Input) -> bool:
    """Return whether a tensor has an input's kind and shape; an axis that may vary must not be empty."""
    like, sizes = wanted.example, list(tensor.shape)
    if len(sizes) != like.dim() or not all(sizes) or kind(tensor) != kind(like):
        return False
    return all(size == like.shape[axis] for axis, size in enumerate(sizes) if axis not in wanted.dynamic)


def check_values(path: Path | str, tensors: Mapping[str, Tensor], vocabulary: int) -> None:
    """Check that numbers are finite and that ids lie in the vocabulary."""
    for tensor in tensors.values():
        if not tensor.is_floating_point():
            check_ids(path, int(tensor.min()), int(tensor.max()), vocabulary)
    check_finite(path, tensors)


def check_finite(path: Path | str, tensors: Mapping[str, Tensor]) -> None:
    """Check that numbers are finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool((finite := tensor.float().isfinite()).all()):
            index = int((~finite).nonzero()[0, 0]) if tensor.dim() else 0
            raise QuantizeError(f"{path} holds values of {name} that are not finite, the first in sample {index}")


def described(inputs: Mapping[str, Input]) -> str:
    """Say in words what a model takes: `pixel_values [samples, 3, 224, 224] of floats`."""
    return " and ".join(f"{name} [{axes(found)}] of {kind(found.example)}" for name, found in inputs.items())


def axes(wanted: Input) -> str:
    """Return the sizes of an input's axes, or the names of what they count."""
    words = dict(zip(wanted.dynamic, ("samples", "tokens"), strict=False)) | dict(wanted.free)
    return ", ".join(words.get(axis, str(size)) for axis, size in enumerate(wanted.example.shape))


def kind(tensor: Tensor) -> str:
    """Return `floats`, `integers`, or the name of a dtype that is neither."""
    if tensor.is_floating_point():
        return "floats"
    return "integers" if tensor.dtype in INTEGERS else str(tensor.dtype)
