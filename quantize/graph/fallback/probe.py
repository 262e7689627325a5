"""A trial run tells what no graph tells of a model that cannot be exported."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantize.errors import QuantizeError
from quantize.graph.fallback.float_model import FloatModel, plain_linears

UNKNOWN = 2**31  # taken if no smaller bound of token ids is known


def vocabulary(model: FloatModel) -> int:
    """Return the config's vocabulary, or the rows of the smallest table that token ids index as they are."""
    size = int(getattr(getattr(model.module, "config", None), "vocab_size", UNKNOWN))
    found, ids = bounds(model), [name for name, x in model.examples.items() if x.dim() > 1]
    return min([size, *(found[name] for name in [n for n in ids if n in found][:1])])


def bounds(model: FloatModel) -> dict[str, int]:
    """Return for each input that indexes tables as it is the rows of the smallest one."""
    tables = {path: m.num_embeddings for path, m in model.module.named_modules() if isinstance(m, nn.Embedding)}
    given, found = zeros(model), dict[str, int]()
    names = {tensor.untyped_storage().data_ptr(): name for name, tensor in given.items()}

    def note(size: int, ids: Tensor) -> None:
        if name := names.get(ids.untyped_storage().data_ptr()):
            found[name] = min(size, found.get(name, UNKNOWN))

    model.run(given, {path: functools.partial(note, size) for path, size in tables.items()})
    return {name: found[name] for name in model.examples if name in found}


def weights_read(model: FloatModel) -> list[str]:
    """Return linears whose weight the model reads outside of their `forward`, so that nothing can stand in for them."""
    linears = plain_linears(model.module)
    with contextlib.ExitStack() as watch:
        for linear in linears.values():
            watch.callback(setattr, linear, "__class__", type(linear))
            linear.__class__ = Watched
        model.run(zeros(model), {})
    return [path for path, linear in linears.items() if linear.__dict__.pop("read", False)]


def idle_without(model: FloatModel, media: Collection[str]) -> list[str]:
    """Return the paths of linears that do not run where a model is given none of some inputs; [] if it needs them."""
    given, ran = {name: x for name, x in zeros(model).items() if name not in media}, set[str]()
    if not media:
        return []
    linears = plain_linears(model.module)
    try:
        model.run(given, {path: functools.partial(lambda path, _: ran.add(path), path) for path in linears})
    except QuantizeError:
        return []
    return [path for path in linears if path not in ran]


def zeros(model: FloatModel) -> dict[str, Tensor]:
    """Return examples of a model's inputs in memory, all zeros unless the model runs on no others than these."""
    return {k: x.clone() if not x.is_meta else torch.zeros_like(x, device="cpu") for k, x in model.examples.items()}


class Watched(nn.Linear):
    """A linear that notes when anything but its `forward` reads its weight."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        parameters: Any = self._parameters
        return functional.linear(x, parameters["weight"], parameters["bias"])

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            self.__dict__["read"] = True
        return super().__getattr__(name)
