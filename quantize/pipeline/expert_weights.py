"""The float weights of experts that are too many to be held: those of one are read when its turn comes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantize.checkpoint.checkpoint import Checkpoint
from quantize.checkpoint.expert_reader import read_expert
from quantize.graph.basis import Basis, Edge
from quantize.graph.linears import Linear
from quantize.nn.quantized_experts import by_expert
from quantize.transforms.fold import Transform, absorb, sides
from quantize.transforms.online import InputTransform

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ExpertWeights:
    """The weights of a stack of experts, as the steps so far have made them.

    Attributes:
        checkpoint: where they are read.
        linear: the experts.
        device: where their weights are taken.
        changes: what the steps do to the weights of one expert [N, K], or [K, N] if they are stored so, in order.
    """

    checkpoint: Checkpoint
    linear: Linear
    device: torch.device
    changes: tuple[Change, ...] = ()

    def expert(self, number: int) -> Tensor:
        """Read the weights of one expert, float32 [N, K]."""
        W = read_expert(self.checkpoint, self.linear.weight, number, self.linear.experts or 1).to(self.device)
        for change in self.changes:
            W = change(W)
        return self._turned(W).contiguous()

    def whole(self) -> Tensor:
        """Read the weights of all experts, [experts · N, K], which is all that they are kept apart to avoid."""
        return torch.cat([self.expert(number) for number in range(self.linear.experts or 1)])

    def changed(self, change: Change) -> ExpertWeights:
        """Return the weights behind one more change of [N, K]."""
        return self._with(lambda W: self._turned(change(self._turned(W))))

    def folded(self, basis: Basis, transform: Transform) -> ExpertWeights:
        """Return the weights that have absorbed a transform of one basis."""
        found = self
        for edge, side in sides(basis, transform):
            if edge.parameter == self.linear.weight:
                found = found._with(functools.partial(absorb, edge=of_one(edge), side=side))
        return found

    def _turned(self, W: Tensor) -> Tensor:
        return W.T if self.linear.transposed else W

    def _with(self, change: Change) -> ExpertWeights:
        return replace(self, changes=(*self.changes, change))


def of_one(edge: Edge) -> Edge:
    """Return the edge of one expert of a stack, in all of which it is the same."""
    return replace(edge, axis=edge.axis - 1, region=edge.region[1:])


@dataclass(frozen=True)
class AllWeights(Mapping[str, Tensor]):
    """The weights that a block holds, and those of its experts, which are read whole if they are asked for."""

    held: Mapping[str, Tensor]
    apart: Mapping[str, ExpertWeights]

    def __getitem__(self, name: str) -> Tensor:
        if name in self.held:
            return self.held[name]
        found = self.apart[name]
        return found.linear.as_out_in(found.whole())

    def __contains__(self, name: object) -> bool:
        return name in self.held or name in self.apart

    def __iter__(self) -> Iterator[str]:
        return iter((*self.held, *self.apart))

    def __len__(self) -> int:
        return len(self.held) + len(self.apart)


@dataclass(frozen=True)
class FloatExperts:
    """Experts in floating point that multiply as `QuantizedExperts` do, each read when its rows are multiplied."""

    weights: ExpertWeights
    input_transform: InputTransform
    out_features: int

    @property
    def count(self) -> int:
        """The number of experts."""
        return self.weights.linear.experts or 1

    def __call__(self, x: Tensor, offs: Tensor | None = None) -> Tensor:
        """Map rows [S, K], sorted by expert up to row `offs` [experts] of each, or [experts, S, K], to [..., N]."""
        return by_expert(x, offs, self._product, self.out_features)

    @contextlib.contextmanager
    def turn(self, number: int, dtype: torch.dtype) -> Iterator[Callable[[Tensor], Tensor]]:
        """Hold one expert, whose product is in float32."""
        del dtype
        found, W = self.input_transform, self.weights.expert(number)
        bias = found.bias(W, None)
        yield lambda x: torch.nn.functional.linear(found.transform(x), W, bias)

    def _product(self, number: int, x: Tensor) -> Tensor:
        with self.turn(number, x.dtype) as product:
            return product(x)
