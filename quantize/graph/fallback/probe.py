"""A trial run tells what no graph tells of a model that cannot be exported."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantize.graph.fallback.float_model import FloatModel, plain_linears

UNKNOWN = 2**31  # taken if no smaller bound of token ids is known


def vocabulary(model: FloatModel) -> int:
    """Return the config's vocabulary, or the rows of the smallest table that the inputs index as they are."""
    tables = {path: m.num_embeddings for path, m in model.module.named_modules() if isinstance(m, nn.Embedding)}
    sizes, given = [int(getattr(getattr(model.module, "config", None), "vocab_size", UNKNOWN))], zeros(model)
    storages = {tensor.untyped_storage().data_ptr() for tensor in given.values()}

    def note(size: int, ids: Tensor) -> None:
        sizes.extend([size] if ids.untyped_storage().data_ptr() in storages else [])

    model.run(given, {path: functools.partial(note, size) for path, size in tables.items()})
    return min(sizes)


def weights_read(model: FloatModel) -> list[str]:
    """Return linears whose weight the model reads outside of their `forward`, so that nothing can stand in for them."""
    linears = plain_linears(model.module)
    with contextlib.ExitStack() as watch:
        for linear in linears.values():
            watch.callback(setattr, linear, "__class__", type(linear))
            linear.__class__ = Watched
        model.run(zeros(model), {})
    return [path for path, linear in linears.items() if linear.__dict__.pop("read", False)]


def zeros(model: FloatModel) -> dict[str, Tensor]:
    """Return examples of a model's inputs in memory, all zeros."""
    return {name: torch.zeros_like(example, device="cpu") for name, example in model.examples.items()}


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
