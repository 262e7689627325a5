"""A trial run with stand-ins for linears shows where the model around them asks for more than a product."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from quantize.graph.linears import Linear

KNOWN = ("in_features", "out_features", "bias")  # attributes that a quantized linear has, too


class StandIn(nn.Module):
    """A stand-in that returns a linear's output without values, and notes when anything else is asked of it."""

    def __init__(self, original: nn.Module, rows: int) -> None:
        super().__init__()
        self.__dict__.update(original=original, rows=rows, asked=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        return x.new_empty(*x.shape[:-1], self.rows)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["original"], name)
        self.__dict__["asked"] |= name not in KNOWN
        return value


@torch.no_grad()
def read_past_forward(model: nn.Module, linears: Iterable[Linear], given: Mapping[str, Any]) -> frozenset[str]:
    """Return weights of linears of which the model reads more than their product, as far as a run without values gets.

    Args:
        model: the model on the meta device.
        linears: modules that compute one product each.
        given: arguments of `forward` on the meta device.
    """
    rows = {linear.path: (linear.weight, int(linear.node.meta["val"].shape[-1])) for linear in linears}
    stand_ins = {path: StandIn(model.get_submodule(path), size) for path, (_, size) in rows.items()}
    with contextlib.ExitStack() as put_back, contextlib.suppress(Exception):  # some code needs values
        for path, stand_in in stand_ins.items():
            put_back.callback(model.set_submodule, path, stand_in.original)
            model.set_submodule(path, stand_in)
        mode = put_back.enter_context(FakeTensorMode(allow_non_fake_inputs=True))  # makes such code do without values
        model(**{name: mode.from_tensor(x) if isinstance(x, Tensor) else x for name, x in given.items()})
    return frozenset(weight for path, (weight, _) in rows.items() if stand_ins[path].asked)
