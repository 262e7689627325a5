"""Every token's input of every expert, as if the router had sent all tokens to all experts."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.graph.experts import gathered_bias, nodes_between
from quantize.graph.interpreter import Overrides, Values, run_node
from quantize.graph.linears import Linear
from quantize.graph.program import Program
from quantize.transforms.online import InputTransform


@dataclass(frozen=True)
class AllTokens:
    """What `ExpertRows` tells, of all tokens; the run itself goes on with the router's choice.

    Attributes:
        program: the program.
        producer: experts whose input is a gather of tokens, in front of whose product both models stand.
        linear: the experts whose inputs are asked for: the producer, or experts that read what the producer computes.
        quantized, float_model: the values of the two models; the latter is empty if no reference is needed.
        states: what the two models run with.
    """

    program: Program
    producer: Linear
    linear: Linear
    quantized: Sequence[Values]
    float_model: Sequence[Values]
    states: tuple[Overrides, Overrides]

    @functools.cached_property
    def counts(self) -> list[int]:
        """The number of tokens, for each expert."""
        tokens = sum(len(self._a_row_of_each_token(values)) for values in self.quantized)
        return [tokens] * (self.linear.experts or 0)

    def of(self, expert: int, found: InputTransform) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield for each batch an expert's rows [n, K] as `ExpertRows.of` does."""
        for number, values in enumerate(self.quantized):
            x = y = self._inputs(values, self.states[0], expert)
            if len(self.float_model):
                y = self._inputs(self.float_model[number], self.states[1], expert)
            yield found.quantized(x), found.rotate(y)

    def _a_row_of_each_token(self, values: Values) -> Tensor:
        tokens: Tensor = values[self.program.token_of_row[self.producer.offsets]]  # type: ignore[index]
        place = tokens.new_full((int(tokens.max()) + 1,), -1)
        place[tokens] = torch.arange(len(tokens), device=tokens.device)
        return place[place >= 0]

    @torch.no_grad()
    def _inputs(self, values: Values, state: Overrides, expert: int) -> Tensor:
        """Return the input of one expert for each token, in the order of the tokens."""
        rows: Tensor = values[self.producer.source][self._a_row_of_each_token(values)]
        if self.linear is self.producer:
            return rows
        nodes = nodes_between(self.producer, self.linear) or []
        ends = (torch.arange(self.producer.experts or 0, device=rows.device) >= expert) * len(rows)
        made: Values = dict(zip(self.producer.operands, (rows, ends), strict=True))
        for bias in (source for node in nodes for source in node.all_input_nodes if gathered_bias(source)):
            of_all = state.weights[self.program.parameters[bias.args[0]]]  # type: ignore[index]
            made[bias] = of_all[expert].expand(len(rows), -1)
        for node in (self.producer.node, *nodes):
            made[node] = run_node(self.program, node, made, state)
        found: Tensor = made[self.linear.source]
        return found
