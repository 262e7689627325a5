"""A model with fewer experts in each layer is the same class, built from a config that says a smaller number."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from quantize.checkpoint.checkpoint import Checkpoint
from quantize.checkpoint.meta_model import build_skeleton
from quantize.errors import UsageError

Key = tuple[str, ...]  # of a number in a config, from the outermost table to the innermost
Shapes = dict[str, tuple[int, ...]]


def with_fewer_experts(checkpoint: Checkpoint, count: int, kept: Mapping[str, Sequence[int]]) -> Checkpoint:
    """Return a checkpoint of which only some experts are read, with a config that says how many.

    What holds experts, and which key of the config says their number, is what changes when that number does: a model
    is built for each candidate without weights. So rows of routers, biases and corrections go as well.

    Args:
        checkpoint: the model.
        count: the number of experts in each layer.
        kept: a parameter of each layer whose first axis counts its experts → those that stay, in order, as many in
            each layer.

    Raises:
        UsageError: no number of the config alone is that of experts.
    """
    left = len(next(iter(kept.values())))
    before, found = shapes(checkpoint, checkpoint.config), list[tuple[Key, dict[str, int]]]()
    for key in numbers(checkpoint.config, count) if checkpoint.config else ():
        try:
            after = shapes(checkpoint, with_number(checkpoint.config, key, left))
        except UsageError:
            continue
        axes = shortened(before, after, count, left)
        if axes is not None and all(axes.get(name) == 0 for name in kept):
            found.append((key, axes))
    if not found:
        raise UsageError(
            f"the experts cannot be dropped: no number in the model's config is that of its {count} experts alone; "
            "leave the table prune out"
        )
    config = checkpoint.config
    for key, _ in found:
        config = with_number(config, key, left)
    chosen = {name: (axis, tuple(kept[nearest(name, kept)])) for name, axis in found[0][1].items()}
    return replace(checkpoint, config=config, kept=chosen)


def numbers(config: Any, value: int, key: Key = ()) -> Iterator[Key]:
    """Yield the keys of a config, and of tables in it, that have a value."""
    for name, item in config.items():
        if isinstance(item, dict):
            yield from numbers(item, value, (*key, name))
        elif type(item) is int and item == value:
            yield (*key, name)


def with_number(config: Mapping[str, Any], key: Key, value: int) -> dict[str, Any]:
    """Return a config with another number at a key."""
    changed: dict[str, Any] = copy.deepcopy(dict(config))
    table = changed
    for name in key[:-1]:
        table = table[name]
    table[key[-1]] = value
    return changed


def shapes(checkpoint: Checkpoint, config: dict[str, Any]) -> Shapes:
    """Return the shapes of all tensors of the model that a config builds, without building one of them."""
    if not config:
        return {}
    with torch.device("meta"):
        model = build_skeleton(config, checkpoint.bounds, checkpoint.code)
    return {name: tuple(x.shape) for name, x in model.state_dict().items()}


def shortened(before: Shapes, after: Shapes, count: int, left: int) -> dict[str, int] | None:
    """Return the axis of each tensor that has become shorter, from `count` to `left`; None if anything else changed."""
    if before.keys() != after.keys():
        return None
    found = dict[str, int]()
    for name, shape in before.items():
        axes = [axis for axis, pair in enumerate(zip(shape, after[name], strict=False)) if pair == (count, left)]
        expected = tuple(left if axes[:1] == [axis] else n for axis, n in enumerate(shape))
        if after[name] != expected:
            return None
        found |= {name: axes[0]} if axes else {}
    return found


def nearest(name: str, others: Mapping[str, Any]) -> str:
    """Return the name whose path shares the longest beginning with another name's."""
    parts = name.split(".")

    def common(other: str) -> int:
        same = [a == b for a, b in zip(parts, other.split("."), strict=False)]
        return [*same, False].index(False)

    return max(others, key=common)
