"""Stacks of experts of a model that cannot be exported are found by what stands in for them as the model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantize.graph.experts import expert_rows
from quantize.graph.stack_stand_in import Stack


class WatchedStack(Stack):
    """A stack of weights in floating point that notes the rows that meet each expert, and whether all are products.

    Attributes:
        parameter: the weights, [count, N, K] or [count, K, N].
        transposed: whether they are [count, K, N].
        rows: for each expert the rows [n, K] that met it.
        read: whether the model has read it in another way than by the products of its experts.
    """

    index = None

    def __init__(self, parameter: Tensor, transposed: bool) -> None:
        stack = parameter.detach()
        self.qweight, self.transposed, self.read = stack, transposed, False
        self.W = stack.mT if transposed else stack
        self.count, self.out_features, self.in_features = self.W.shape
        self.computes_in = stack.new_empty(0)
        self.rows: list[list[Tensor]] = [[] for _ in range(self.count)]

    @property
    def experts(self) -> WatchedStack:  # type: ignore[override]
        """Itself."""
        return self

    def __call__(self, x: Tensor, offs: Tensor | None = None) -> Tensor:
        """Multiply the rows of all experts, as `QuantizedExperts` does."""
        if offs is None:
            return torch.stack([self.expert_product(e, rows) for e, rows in enumerate(x)])
        y = x.new_zeros(len(x), self.out_features)
        for expert, rows in expert_rows(offs):
            y[rows] = self.expert_product(expert, x[rows])
        return y

    def by_row(self, x: Tensor, numbers: Tensor) -> Tensor:
        """Multiply x [S, m, K], where row s belongs to the expert `numbers` [S]: [S, m, N]."""
        y = x.new_zeros(*x.shape[:-1], self.out_features)
        for expert in numbers.unique().tolist():
            y[numbers == expert] = self.expert_product(expert, x[numbers == expert])
        return y

    def expert_product(self, number: int, x: Tensor) -> Tensor:
        """Multiply x [..., K] by one expert: [..., N]."""
        self.rows[number % self.count].append(x.detach().reshape(-1, x.shape[-1]).clone())
        return torch.nn.functional.linear(x, self.W[number])

    def weights(self) -> Tensor:
        """Return all weights [count, N, K] to whatever reads them."""
        self.read = True
        return self.W

    def sorted_rows(self) -> tuple[Tensor, Tensor]:
        """Return the rows that it met, sorted by expert [S, K], and where those of each end, int64 [count]."""
        of_each = [torch.cat([self.W.new_empty(0, self.in_features), *rows]) for rows in self.rows]
        return torch.cat(of_each), torch.tensor([len(rows) for rows in of_each]).cumsum(0)


def candidates(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that may be stacks of experts, by name."""
    return {name: p for name, p in model.named_parameters() if p.dim() == 3 and len(p) > 1}


@contextlib.contextmanager
def standing_in(model: nn.Module, stacks: Mapping[str, WatchedStack]) -> Iterator[None]:
    """Put stand-ins in the places of parameters until the `with` block ends."""
    with contextlib.ExitStack() as undo:
        for path, stack in stacks.items():
            parent, _, leaf = path.rpartition(".")
            owner = model.get_submodule(parent)
            undo.callback(put_back, owner, leaf, dict(owner._parameters))
            del owner._parameters[leaf]
            owner.__dict__[leaf] = stack
        yield


def put_back(owner: nn.Module, leaf: str, parameters: dict[str, Any]) -> None:
    """Give a module its parameters again, in their order."""
    del owner.__dict__[leaf]
    owner._parameters.clear()
    owner._parameters.update(parameters)
