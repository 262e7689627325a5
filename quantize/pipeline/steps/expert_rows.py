"""The rows that reach each expert, and what they would be in the float model, which may send a token elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.graph.experts import expert_rows
from quantize.graph.interpreter import Values
from quantize.graph.linears import Linear
from quantize.graph.program import Program
from quantize.transforms.online import InputTransform


@dataclass(frozen=True)
class ExpertRows:
    """The input rows of a stack of experts, batch by batch.

    Each model keeps its own routing. A row of the quantized model is paired with the float model's row of the same
    token and expert, or just of the same token where the input is that of all experts. The graph tells the token by the
    gather that sorts the rows. A row without partner is paired with itself as it is before it is rounded.

    Attributes:
        program, linear: the program and the experts.
        quantized: the values of the quantized model at the experts' product.
        float_model: those of the float model; empty if no reference is needed.
    """

    program: Program
    linear: Linear
    quantized: Sequence[Values]
    float_model: Sequence[Values] = ()

    @functools.cached_property
    def counts(self) -> list[int]:
        """The number of rows of each expert; rows that are all zeros, of tokens not routed to it, do not count."""
        found = [0] * (self.linear.experts or 0)
        for values in self.quantized:
            if self.linear.offsets is None:
                for expert, x in enumerate(values[self.linear.source]):
                    found[expert] += int(x.any(dim=-1).sum())
            for expert, rows in expert_rows(values[self.linear.offsets]) if self.linear.offsets else ():
                found[expert] += rows.stop - rows.start
        return found

    def of(self, expert: int, found: InputTransform) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield for each batch an expert's rows [n, K] as its rounded weights meet them, and as the float model's do.

        Args:
            expert: the number of the expert.
            found: the input transform of the experts.
        """
        for number, values in enumerate(self.quantized):
            x = self._rows(values, expert)
            y = found.rotate(x).clone()
            if len(self.float_model) and len(x):
                where, place = self._partners(number, values, expert)
                y[where] = found.rotate(self._all_rows(self.float_model[number], expert)[place])
            yield found.quantized(x), y

    def all(self, found: InputTransform) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what `of` yields for every expert."""
        for expert in range(self.linear.experts or 0):
            yield from self.of(expert, found)

    def _rows(self, values: Values, expert: int) -> Tensor:
        x: Tensor = values[self.linear.source]
        return x[expert] if self.linear.offsets is None else x[self._slice(values, expert)]

    def _all_rows(self, values: Values, expert: int) -> Tensor:
        """Return the rows among which `_partners` tells places."""
        x: Tensor = values[self.linear.source]
        return x[expert] if self.linear.offsets is None else x

    def _slice(self, values: Values, expert: int) -> slice:
        ends = values[self.linear.offsets]  # type: ignore[index]
        return slice(int(ends[expert - 1]) if expert else 0, int(ends[expert]))

    def _partners(self, number: int, values: Values, expert: int) -> tuple[Tensor, Tensor]:
        """Return which of an expert's rows have a partner in the float model, and where its row is."""
        if self.linear.offsets is None:
            x = values[self.linear.source]
            every = torch.arange(x.shape[1], device=x.device)
            return every, every
        tokens, other = self.program.token_of_row.get(self.linear.offsets), self.float_model[number]
        if tokens is None:
            none = values[self.linear.source].new_empty(0, dtype=torch.int64)
            return none, none
        rows = slice(0, None) if self.program.gathers_tokens(self.linear) else self._slice(other, expert)
        mine, held = values[tokens][self._slice(values, expert)], other[tokens][rows]
        place = held.new_full((1 + int(torch.cat([mine, held]).max()),), -1)
        place[held] = torch.arange(len(held), device=held.device) + rows.start
        where = (place[mine] >= 0).nonzero()[:, 0]
        return where, place[mine][where]
