"""Calibration data may hold a tensor for each argument of `forward`: any module runs on such rows, taken whole."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.calibration.data import Row, Samples, spread
from quantize.calibration.image_records import PATCHES, PIXELS, has_images, process_records
from quantize.calibration.padding import without_padding
from quantize.calibration.records import IDS, MASK
from quantize.calibration.table_files import Saved, load_tensors
from quantize.calibration.tensor_samples import check_finite, kind, read_stamped, sha256_of
from quantize.checkpoint.paths import require_file
from quantize.errors import QuantizeError, UsageError
from quantize.graph.inputs import (
    NO_INPUTS,
    Input,
    arguments_of,
    example_inputs,
    inputs_like,
    listed,
    required_arguments,
    with_sizes,
)

IN_MEMORY = "the calibration data"


@dataclass(frozen=True)
class Given:
    """What calibration data hold.

    Attributes:
        data: the data; an iterator that was looked into starts again from its first element.
        first: the tensors by name that the data begin with, a tensor without a name as `""`; None if they begin with
            something else.
        source: where they come from, for messages.
        sha256: the hash of a file that was read.
        batched: whether `first` is all there is, and its first axis the samples.
        saved: what a file holds that torch saved, so that it is not read again.
    """

    data: Any
    first: Mapping[str, Tensor] | None = None
    source: str = IN_MEMORY
    sha256: str = ""
    batched: bool = False
    saved: Saved | None = field(default=None, repr=False)


def look_into(data: Any) -> Given:
    """Return calibration data with the tensors by name that they begin with.

    Raises:
        UsageError: there is no such file.
        QuantizeError: it is damaged.
    """
    if isinstance(data, str | Path):
        path = Path(data)
        if path.suffix == ".safetensors":
            require_file(path)
            tensors, digest = read_stamped(path)
            return Given(data, tensors, str(path), digest, batched=True)
        saved = load_tensors(path) if path.suffix == ".pt" and path.is_file() else None
        named = tensors_of(saved.content) if saved is not None and isinstance(saved.content, Mapping) else None
        return Given(data, named, str(path), batched=True, saved=saved)
    if isinstance(data, Mapping | Tensor):
        return Given(data, tensors_of(data), batched=True)
    if not isinstance(data, Iterable):
        return Given(data)
    if isinstance(data, Sequence):
        return Given(data, tensors_of(data[0]) if data else None)
    items = iter(data)
    head = list(itertools.islice(items, 1))
    return Given(itertools.chain(head, items), tensors_of(head[0]) if head else None)


def processed(model: nn.Module, data: Any, directory: Path | None, limit: int, text_column: str | None) -> Given | None:
    """Return what a model's processor makes of records with images, without what `forward` does not name.

    It is None for other data, and for a model that takes no images.

    Raises:
        UsageError: there is no processor, or it does not take a record.
        QuantizeError: a file cannot be read.
    """
    if PIXELS not in arguments_of(model) or not has_images(data):
        return None
    source = str(data) if isinstance(data, str | Path) else IN_MEMORY
    batches = process_records(data, source, directory, limit, text_column)
    known = [{name: x for name, x in batch.items() if name in arguments_of(model)} for batch in batches]
    return Given(known, tensors_of(known[0]), source)


def longest(given: Given) -> int:
    """Return how many tokens the samples of data that are read whole have; a large number if nothing tells."""
    lengths = [x.shape[1] for x in (given.first or {}).values() if x.dim() == 2 and not x.is_floating_point()]
    return max(lengths) if lengths and given.batched else sys.maxsize


def tensors_of(item: Any) -> dict[str, Tensor] | None:
    """Return the tensors by name of a batch or a sample, where labels may stand behind a tensor; None without any."""
    if isinstance(item, list | tuple) and item and isinstance(item[0], Tensor):
        item = item[0]
    if isinstance(item, Tensor):
        return {"": item}
    if not isinstance(item, Mapping):
        return None
    return {str(name): x for name, x in item.items() if isinstance(x, Tensor)} or None


def match_inputs(model: nn.Module, given: Given, limit: int) -> tuple[dict[str, Input], tuple[Row, ...] | None]:
    """Return the inputs that a model is to be exported with, and the samples if these are taken whole.

    Data that hold what the model takes by itself, such as texts or token ids, are read with `read_source`. Data with
    tensors for other arguments of `forward` decide on the inputs, and their samples are taken whole.

    Raises:
        UsageError: the model does not take what the data hold, or takes more.
        QuantizeError: the data hold nothing, or numbers that are not finite.
    """
    try:
        known, refusal = example_inputs(model), None
    except UsageError as error:
        known, refusal = {}, error
    names = [*known, *input_arguments(model)]
    if given.first is not None and "" in given.first and names:
        given = replace(given, first={names[0]: given.first[""]})
    if given.first is None or is_known(model, given, known):
        if refusal is not None:
            raise refusal
        return with_sizes(known, given.first or {}), None
    rows = rows_of(model, given, known, limit)
    found = inputs_like(model, rows)
    return found, tuple({name: row[name] for name in found} for row in rows)


def is_known(model: nn.Module, given: Given, known: Mapping[str, Input]) -> bool:
    """Return whether data hold what a model takes by itself."""
    first = given.first or {}
    extra = {name for name in first if name not in known and name in arguments_of(model)}
    extra -= without_default(model, NO_INPUTS)
    if len(known) == 1 and "attention_mask" in extra:  # what a mask leaves out is removed
        extra.remove(MASK)
    if extra or not known:
        return False
    declared = getattr(model, "main_input_name", None) is not None
    return declared or not known.keys() <= first.keys() or all(like(first[n], x, given) for n, x in known.items())


def like(tensor: Tensor, wanted: Input, given: Given) -> bool:
    """Return whether a tensor is of an input's kind and number of axes."""
    axes = {wanted.example.dim()} | (set() if given.batched else {wanted.example.dim() - 1})
    return kind(tensor) == kind(wanted.example) and tensor.dim() in axes


def without_default(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return those of some names that are no arguments of `forward`, or have a default there."""
    return {*names} - {*required_arguments(model)}


def input_arguments(model: nn.Module) -> list[str]:
    """Return the arguments of `forward` that have to be given, or the first one if none has."""
    return required_arguments(model) or arguments_of(model)[:1]


def rows_of(model: nn.Module, given: Given, known: Mapping[str, Input], limit: int) -> tuple[Row, ...]:
    """Return the samples of data with tensors by name, without those that `forward` does without.

    Raises:
        UsageError: a tensor has no argument, an argument no tensor, or the tensors do not go together.
        QuantizeError: there is no sample, or a number is not finite.
    """
    rows: list[dict[str, Tensor]] = []
    for batch in [given.first] if given.batched else given.data:
        tensors = tensors_of(batch) or {}
        tensors = {name or input_arguments(model)[0]: x for name, x in tensors.items()}
        single = any(name in tensors and tensors[name].dim() < x.example.dim() for name, x in known.items())
        rows += samples_of(model, {n: x[None] for n, x in tensors.items()} if single else tensors, given)
        if len(rows) >= limit and not isinstance(given.data, Sequence) and not given.batched:
            break
    if not rows:
        raise QuantizeError(f"{given.source} holds no sample")
    chosen = [{name: value_of(x) for name, x in without_padding(row).items()} for row in spread(rows, limit)]
    if MASK in chosen[0] and all(bool(row[MASK].all()) for row in chosen):
        chosen = [{name: x for name, x in row.items() if name != MASK} for row in chosen]
    for row in chosen:
        if shape_names(row) != shape_names(chosen[0]):
            raise UsageError(f"{given.source} holds samples of unlike tensors; give all of them the same ones")
        check_finite(given.source, row)
    return tuple(chosen)


def samples_of(model: nn.Module, tensors: Mapping[str, Tensor], given: Given) -> Iterator[dict[str, Tensor]]:
    """Yield the samples of a batch that has a tensor for each argument.

    Raises:
        UsageError: a tensor has no argument, an argument no tensor, or there are unequal numbers of samples.
    """
    arguments, required = arguments_of(model), required_arguments(model)
    tensors = with_patches_of_one(tensors)
    names = [name for name in tensors if name not in without_default(model, NO_INPUTS)]
    unknown = [name for name in names if name not in arguments]
    missing = [name for name in required if name not in names]
    if missing or unknown:
        what = f"no {listed(missing)}" if missing else f"a tensor {unknown[0]}"
        takes = ", ".join(required or arguments)
        raise UsageError(
            f"{given.source} holds {what}; the model's forward takes {takes}: give a tensor for each, whose first "
            "axis is the samples"
        )
    counts = {name: len(tensors[name]) if tensors[name].dim() else 0 for name in names}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        shown = " and ".join(f"{count} of {name}" for name, count in counts.items())
        raise UsageError(
            f"{given.source} holds {shown}; the first axis of each tensor is the samples: give as many of each"
        )
    yield from ({name: tensors[name][i] for name in names} for i in range(next(iter(counts.values()))))


def with_patches_of_one(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a batch in which the patches of images are one sample's, if the ids are of one.

    Processors give patches as [patches, channels], without an axis for samples (Qwen2-VL and what came after it).
    """
    ids = tensors.get(IDS)
    if ids is None or ids.dim() != 2 or len(ids) != 1:
        return tensors
    return {
        name: x[None] if name.startswith(PIXELS) and x.dim() == PATCHES and len(x) > 1 else x
        for name, x in tensors.items()
    }


def value_of(tensor: Tensor) -> Tensor:
    """Return one input of one sample: floats in float32, integers in int64, truth values as they are."""
    if tensor.dtype == torch.bool:
        return tensor
    return tensor.float() if tensor.is_floating_point() else tensor.long()


def shape_names(row: Row) -> dict[str, tuple[int, str]]:
    """Return the number of axes and the kind of each input."""
    return {name: (x.dim(), kind(x)) for name, x in row.items()}


def whole_samples(rows: tuple[Row, ...], given: Given, bounds: Mapping[str, int]) -> Samples:
    """Return samples that are taken whole.

    Args:
        rows: the samples.
        given: the data that they come from.
        bounds: input → the number that its integers must lie below.

    Raises:
        UsageError: an integer is not in the table that the model looks it up in.
    """
    for name, bound in bounds.items():
        low, high = min(int(row[name].min()) for row in rows), max(int(row[name].max()) for row in rows)
        if low < 0 or high >= bound:
            raise UsageError(
                f"{given.source} holds {low if low < 0 else high} in {name}; the model knows 0 to {bound - 1}"
            )
    return Samples(rows, given.sha256 or sha256_of(rows), whole=True)
