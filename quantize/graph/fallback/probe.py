"""A trial run tells what no graph tells of a model that cannot be exported."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from quantize.errors import QuantizeError
from quantize.graph.fallback.float_model import FloatModel, plain_linears
from quantize.graph.weight_attributes import WeightAttributes

UNKNOWN = 2**31  # taken if no smaller bound of token ids is known


def vocabulary(model: FloatModel) -> int:
    """Return the config's vocabulary, or the rows of the smallest table that token ids index as they are."""
    size = int(getattr(getattr(model.module, "config", None), "vocab_size", UNKNOWN))
    found, ids = bounds(model), [name for name, x in model.examples.items() if x.dim() > 1]
    return min([size, *(found[name] for name in [n for n in ids if n in found][:1])])


def bounds(model: FloatModel) -> dict[str, int]:
    """Return for each input that indexes tables as it is the rows of the smallest one."""
    given, found = zeros(model), dict[str, int]()
    names = {tensor.untyped_storage().data_ptr(): name for name, tensor in given.items()}
    with Lookups(names, found):
        model.run(given, {})
    return {name: found[name] for name in model.examples if name in found}


class Lookups(TorchDispatchMode):
    """Notes in `found` the rows of the smallest table in which the tensors in `names` are looked up."""

    def __init__(self, names: Mapping[int, str], found: dict[str, int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names, self.found = names, found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and note what a lookup reads."""
        del types
        if func is torch.ops.aten.embedding.default:
            table, ids = args[:2]
            if name := self.names.get(ids.untyped_storage().data_ptr()):
                self.found[name] = min(len(table), self.found.get(name, UNKNOWN))
        return func(*args, **kwargs or {})


def weights_read(model: FloatModel) -> list[str]:
    """Return linears whose weight the model reads outside of their `forward`, so that nothing can stand in for them.

    A model that asks a weight for its dtype, device or shape alone reads none, unless it cannot do with an answer that
    is no tensor.
    """
    with contextlib.suppress(QuantizeError):
        return watched(model, WatchedAttributes)
    return watched(model, Watched)


def watched(model: FloatModel, kind: type[Watched]) -> list[str]:
    """Return the linears that note, as another class in a run of the model, that their weight is read."""
    linears = plain_linears(model.module)
    for linear in linears.values():
        linear.__dict__["read"] = False
    with contextlib.ExitStack() as watch:
        for linear in linears.values():
            watch.callback(setattr, linear, "__class__", type(linear))
            linear.__class__ = kind
        model.run(zeros(model), {})
    return [path for path, linear in linears.items() if linear.__dict__.pop("read")]


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


class WatchedAttributes(Watched):
    """A linear that notes when anything but its `forward` asks its weight for more than a quantized linear answers."""

    def __getattr__(self, name: str) -> Any:
        return AskedWeight(self) if name == "weight" else super().__getattr__(name)


class AskedWeight(WeightAttributes):
    """The attributes of a linear's weight, which note when anything else is asked of it, and let the weight answer."""

    def __init__(self, owner: nn.Linear) -> None:
        weight = owner._parameters["weight"]
        assert weight is not None  # it is a plain linear
        super().__init__(weight.dtype, weight.device, tuple(weight.shape))
        self.owner, self.values = owner, weight

    def __getattr__(self, name: str) -> Any:
        self.owner.__dict__["read"] = True
        return getattr(self.values, name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch with the values."""
        del types

        def values(x: AskedWeight) -> Tensor:
            x.owner.__dict__["read"] = True
            return x.values

        args, kwargs = tree_map_only(cls, values, (args, kwargs or {}))
        return function(*args, **kwargs)
