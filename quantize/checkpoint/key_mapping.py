"""Files that are older than the model's code hold tensors under other names, or in parts that are put together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    revert_weight_conversion,
)

from quantize.checkpoint.wrappers import unwrapped


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor of a model lies in its files.

    Attributes:
        names: the names of its parts in the files, in order.
        patterns: for each part the converter's pattern that it fits.
        converter: what transformers makes the tensor with from its parts; None for a tensor that is stored as it is.
        first: the name of the first tensor that the converter makes of its parts; '' for the tensor itself.
    """

    names: tuple[str, ...]
    patterns: tuple[str, ...] = ()
    converter: WeightConverter | None = None
    first: str = ""

    def read(self, target: str, read: Callable[[str], Tensor]) -> Tensor:
        """Read the tensor; `read` returns a part by its name in the files."""
        if self.converter is None:
            return read(self.names[0])
        converter, first = copy.deepcopy(self.converter), self.first or target
        for name, pattern in zip(self.names, self.patterns, strict=True):
            converter.add_tensor(first, name, pattern, read(name))
        made = converter.convert(first)[target]
        tensor: Tensor = made[0] if isinstance(made, list) else made
        return tensor


def map_keys(model: PreTrainedModel, names: Mapping[str, str]) -> dict[str, StoredTensor]:
    """Map names in the model to where they lie, as transformers renames, merges and splits tensors as it loads them.

    Args:
        model: the model without weights.
        names: the names in the files, each with its plain name (`plain_names`).
    """
    find, found = finder(model), dict[str, StoredTensor]()
    for name in sorted(names, key=dot_natural_key):
        first, pattern, converter = find(names[name])
        targets = [first] if converter is None else made_of(first, converter)
        for target in targets:
            before = found.get(target, StoredTensor(()))
            parts = ((*before.names, name), (*before.patterns, pattern))
            found[target] = StoredTensor(*parts, converter, first if len(targets) > 1 else "")
    return found


def made_of(first: str, converter: WeightConverter) -> list[str]:
    """Return the names of all tensors that a converter makes, of which the first has a given name."""
    pattern, *others = converter.target_patterns
    return [first, *(first.replace(pattern, other, 1) for other in others)]


def plain_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Map names in files to those without what wrappers of training put in front."""
    find = finder(model)
    return unwrapped(list(stored), lambda name: find(name)[0], model.state_dict().keys())


def finder(model: PreTrainedModel) -> Callable[[str], tuple[str, str, WeightConverter | None]]:
    """Return a function that finds the name in the model for a plain name in files, and what `converted` returns.

    A name that the model has stays as it is. The name of the base model is put in front or dropped, since files hold
    either the base model or one with a head.
    """
    steps, known = get_model_conversion_mapping(model), model.state_dict().keys()

    def find(name: str) -> tuple[str, str, WeightConverter | None]:
        if name in known:
            return name, "", None
        target, pattern, converter = converted(name, steps)
        return with_base_prefix(target, model.base_model_prefix, known), pattern, converter

    return find


def with_base_prefix(name: str, prefix: str, known: Collection[str]) -> str:
    """Return a name as the model has it, with the name of its base model in front or without."""
    if f"{prefix}.{name}" in known:
        return f"{prefix}.{name}"
    short = name.removeprefix(f"{prefix}.")
    return short if name not in known and short in known else name


def as_stored(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `map_keys` for some whole tensors of a model: return them as transformers saves them in files."""
    stored: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return stored


def stored_name(model: PreTrainedModel, name: str) -> str:
    """Return the name in files of a tensor that lies there as it is; its own name where the files hold another tensor.

    Args:
        model: the model, with weights or without.
        name: the name in the model.
    """
    converters = [x for x in get_model_conversion_mapping(model, add_legacy=False) if isinstance(x, WeightConverter)]
    if any(converter.reverse_transform().rename_source_key(name)[1] is not None for converter in converters):
        return name
    return next(iter(as_stored(model, {name: torch.empty(())})))


def linears_in_files(model: PreTrainedModel, stack: str, transposed: bool) -> dict[str, Tensor]:
    """Return the linears that files hold in the place of a stack of weights, by path, each with its rows of the stack.

    Transformers splits the numbers of the rows as it splits weights that it saves.

    Args:
        model: the model, with weights or without.
        stack: the name of the parameter.
        transposed: whether it is [E, K, N], otherwise [E, N, K].

    Returns:
        Numbers int64 [n] of rows [E · N], all of them once; nothing if the files hold the stack in another way.
    """
    sizes = model.get_parameter(stack).shape
    experts, rows = sizes[0], sizes[2 if transposed else 1]
    numbers = torch.arange(experts * rows).view(experts, rows, 1)
    parts = as_stored(model, {stack: numbers.mT if transposed else numbers})
    read_as = map_keys(model, {name: name for name in parts}).keys()
    if read_as != {stack} or any(x.dim() != 2 or x.shape[1] != 1 for x in parts.values()):
        return {}
    if not all(name.endswith(".weight") for name in parts):
        return {}
    return {name.removesuffix(".weight"): x[:, 0] for name, x in parts.items()}


def makes_one(step: WeightConverter) -> bool:
    """Return whether a step makes one tensor."""
    return len(step.target_patterns) == 1


def splits_evenly(step: WeightConverter) -> bool:
    """Return whether a step cuts one tensor into as many equal parts as it has targets, for which it needs no model."""
    one = len(step.source_patterns) == 1 and len(step.operations) == 1
    return one and isinstance(step.operations[0], Chunk) and step.operations[0].num_shards_attribute is None


def converted(name: str, steps: Iterable[WeightRenaming | WeightConverter]) -> tuple[str, str, WeightConverter | None]:
    """Return a name after all renamings, and the step that merges it into a tensor or splits it into equal parts."""
    known = [step for step in steps if isinstance(step, WeightConverter) and (makes_one(step) or splits_evenly(step))]
    for step in (step for step in steps if isinstance(step, WeightRenaming)):
        name, _ = step.rename_source_key(name)
    for step in known:
        target, pattern = step.rename_source_key(name)
        if pattern is not None:
            return target, pattern, step
    return name, "", None
