"""A trial run with stand-ins for linears shows where the model around them asks for more than a product."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from quantize.graph.linears import MORE_VALUES, READ_ITSELF, Linear
from quantize.graph.weight_attributes import WeightAttributes

KNOWN = ("in_features", "out_features", "bias")  # attributes that a quantized linear has, too


class StandIn(nn.Module):
    """A stand-in that returns a linear's output without values, and notes when anything else is asked of it."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(original=original, asked=False, shown=False, more=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """[..., K] → [..., N]; what the module itself returns, for whatever else it takes or returns."""
        found = self.original(*args, **kwargs)
        self.__dict__["more"] |= len(args) != 1 or bool(kwargs) or not isinstance(found, Tensor)
        return found

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["original"], name)
        if name == "weight" and isinstance(value, Tensor):
            self.__dict__["shown"] = True
            return WatchedWeight(self.__dict__, value.dtype, value.device, tuple(value.shape))
        self.__dict__["asked"] |= name not in KNOWN
        return value


class WatchedWeight(WeightAttributes):
    """The attributes of a weight, which note when anything else is asked of it."""

    def __init__(self, notes: dict[str, Any], *attributes: Any) -> None:
        super().__init__(*attributes)
        self.notes = notes

    def __getattr__(self, name: str) -> Any:
        self.notes["asked"] = True
        raise AttributeError(name)


class LookUp(nn.Embedding):
    """Notes that the lookup of `nn.Embedding` ran, and returns rows without values."""

    def forward(self, ids: Tensor) -> Tensor:
        """[...] → [..., K]."""
        self.__dict__["ran"] = True
        return torch.empty(*ids.shape, self.embedding_dim, device=ids.device)


def looks_up(module: nn.Module) -> bool:
    """Return whether a module on the meta device is an `nn.Embedding` that reads its table by that class's lookup.

    Classes that derive from it may do more to the rows, such as to scale them.
    """
    if not isinstance(module, nn.Embedding):
        return False
    own, probe = type(module), copy.copy(module)
    bases = (LookUp,) if own is nn.Embedding else (own, LookUp)
    probe.__class__ = type(own.__name__, bases, {})
    with contextlib.suppress(Exception):  # a class of its own may ask for other arguments
        probe(torch.zeros(1, 1, dtype=torch.int64, device="meta"))
    return "ran" in vars(probe)


@torch.no_grad()
def asked_for_more(model: nn.Module, linears: Iterable[Linear], given: Mapping[str, Any]) -> dict[str, str]:
    """Return weights of linears of which the model asks for more than a product of one tensor, each with the reason.

    A run without values tells, as far as it gets.

    Args:
        model: the model on the meta device.
        linears: modules that compute one product each.
        given: arguments of `forward` on the meta device.
    """
    weights = {linear.path: linear.weight for linear in linears}
    stand_ins = {path: StandIn(model.get_submodule(path)) for path in weights}
    finished = False
    with contextlib.ExitStack() as put_back, contextlib.suppress(Exception):  # some code needs values
        for path, stand_in in stand_ins.items():
            put_back.callback(model.set_submodule, path, stand_in.original)
            model.set_submodule(path, stand_in)
        mode = put_back.enter_context(FakeTensorMode(allow_non_fake_inputs=True))  # makes such code do without values
        model(**{name: mode.from_tensor(x) if isinstance(x, Tensor) else x for name, x in given.items()})
        finished = True
    read = {weights[path] for path, found in stand_ins.items() if found.asked or (found.shown and not finished)}
    more = (weights[path] for path, found in stand_ins.items() if found.more)
    return dict.fromkeys(more, MORE_VALUES) | dict.fromkeys(read, READ_ITSELF)
