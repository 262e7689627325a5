"""The runner drives calibration batches through a program block by block, all batches in step.

For every batch only the values that are alive at the point reached are held. So a linear can be quantized on the
outputs of everything quantized before it, and each node runs once for each batch.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, Self, TypeGuard

import torch
from torch import Tensor, fx

from quantize.calibration.halving import Shapes, halved, halved_shapes, len_of
from quantize.calibration.spill import ActivationCache
from quantize.calibration.statistics import Statistic
from quantize.graph.experts import expert_rows
from quantize.graph.interpreter import Overrides, Values, run_nodes, start, value_of
from quantize.graph.linears import Linear, by_input
from quantize.graph.program import Program, Segment

SMALL_ACTIVATION_BYTES = (
    1 << 25
)  # bytes of activations up to which an unpacked weight is larger than all that lies between two linears


class InTurns(Protocol):
    """Experts that are not in memory, whose weights are read when their turn comes."""

    count: int
    out_features: int

    def turn(self, number: int, dtype: torch.dtype) -> AbstractContextManager[Callable[[Tensor], Tensor]]:
        """Hold one expert's weights, which maps rows [..., K] to [..., N]; a quantized one multiplies in `dtype`."""


def takes_turns(module: Any) -> TypeGuard[InTurns]:
    """Return whether what runs in the place of a linear is experts that are not in memory."""
    return hasattr(module, "turn")


class SequentialRunner:
    """Batches of inputs on their way through a program.

    Attributes:
        values: for each batch the values that are alive.
        position: at a stop of `advance_to_linears`, how many nodes of the segment have run.
    """

    position: int = 0

    def __init__(
        self,
        program: Program,
        batches: Iterable[Tensor | Mapping[str, Tensor]],
        scratch: Path | None = None,
        on_device: int | None = None,
    ) -> None:
        """Start with batches of inputs; the values that do not fit go where `ActivationCache` says."""
        self.program, self.shapes = program, list[Shapes]()
        self.values = ActivationCache((self._started(given) for given in batches), scratch, on_device)

    def _started(self, given: Tensor | Mapping[str, Tensor]) -> Values:
        named = dict(zip(self.program.inputs, [given], strict=True)) if isinstance(given, Tensor) else given
        self.shapes.append({name: tuple(x.shape) for name, x in named.items()})
        return start(self.program, named)

    @classmethod
    def of(cls, program: Program, values: Iterable[Values], scratch: Path | None = None) -> Self:
        """Return a runner that starts from given values."""
        runner = cls(program, [])
        runner.values = ActivationCache(values, scratch)
        return runner

    def run(self, nodes: Iterable[fx.Node], state: Overrides) -> None:
        """Advance every batch over some nodes."""
        for part in self._parts(tuple(nodes), state):
            if takes_turns(experts := state.linears.get(part[0])):
                self._run_in_turns(part[0], experts, state)
                continue
            with unpacked((state.linears[node] for node in part if node in state.linears), state.product_dtype):
                for number, values in enumerate(self.values):
                    run_nodes(self.program, part, values, state)
                    self.values[number] = values

    def _parts(self, nodes: Sequence[fx.Node], state: Overrides) -> Iterator[Sequence[fx.Node]]:
        """Cut the nodes around experts that take turns.

        Where activations are few, cut behind each other linear that is replaced, too, so that only one weight is
        unpacked at a time.
        """
        few = self.values.file is None and self.values.in_memory() <= SMALL_ACTIVATION_BYTES
        cuts = {0, len(nodes)}
        for n, node in enumerate(nodes):
            alone = takes_turns(state.linears.get(node))
            cuts |= ({n} if alone else set()) | ({n + 1} if alone or (few and node in state.linears) else set())
        return (nodes[first:last] for first, last in itertools.pairwise(sorted(cuts)))

    def _run_in_turns(self, node: fx.Node, experts: InTurns, state: Overrides) -> None:
        """Multiply the rows of all batches by one expert after the other, so that each is read once."""
        source, *offsets = self.program.operands(node)
        rows: list[dict[int, slice]] = []
        for number, values in enumerate(self.values):
            x, *ends = (value_of(self.program, n, values, state) for n in (source, *offsets))
            rows.append(dict(expert_rows(ends[0])) if ends else {e: slice(e, e + 1) for e in range(experts.count)})
            self.values.reserve(number, node, (*x.shape[:-1], experts.out_features), x)
        for expert in sorted({expert for of_batch in rows for expert in of_batch}):
            with torch.no_grad(), experts.turn(expert, state.product_dtype) as product:
                for number, place in ((n, of_batch[expert]) for n, of_batch in enumerate(rows) if expert in of_batch):
                    x = value_of(self.program, source, self.values[number], state)
                    self.values.put(number, node, place.start, product(x[place]))
        for number in range(len(rows)):
            self.values.drop(number, self.program.last_used_by.get(node, ()))

    @property
    def halves(self) -> bool:
        """Whether a batch has several rows, so that `halve` makes smaller ones."""
        return any(len_of(shapes) > 1 for shapes in self.shapes)

    def halve(self) -> bool:
        """Run half as many rows together from now on, between two blocks; return whether values tell the rows apart."""
        pairs = zip(self.values, self.shapes, strict=True)
        try:
            parts = (part for values, shapes in pairs for part in halved(self.program, values, shapes))
            self.values = ActivationCache(parts, self.values.directory, self.values.on_device)
        except ValueError:
            return False
        self.shapes = [part for shapes in self.shapes for part in halved_shapes(shapes)]
        return True

    def outputs(self) -> list[Tensor]:
        """Return the model's outputs, batch by batch, after every node has run."""
        return [values[node] for values in self.values for node in self.program.output.all_input_nodes]

    def advance_to_linears(
        self, segment: Segment, state: Overrides, targets: Iterable[Linear], finish: bool = True
    ) -> Iterator[list[Linear]]:
        """Advance through a segment, stopping before the first call of the targets that share inputs, for all inputs.

        The caller may change `state.linears` at each stop, and the linears then run as it says. Without `finish` the
        run ends at the last stop.
        """
        done = 0
        for sharing in by_input(targets):
            position = segment.nodes.index(sharing[0].node)
            self.run(segment.nodes[done:position], state)
            done = self.position = position
            yield sharing
        if finish:
            self.run(segment.nodes[done:], state)

    def collect_without_advancing(
        self,
        segment: Segment,
        state: Overrides,
        targets: Iterable[Linear],
        make: Callable[[], Statistic],
        behind: Mapping[Linear, Callable[[Tensor], Tensor]],
    ) -> dict[str, Statistic]:
        """Collect statistics of the inputs of a segment's linears, by the name of the weight, without advancing.

        What a linear's input goes through before it counts is in `behind`.
        """
        collected: dict[str, Statistic] = {}
        for values in self.values:
            ahead = SequentialRunner.of(self.program, [dict(values)])
            for sharing in ahead.advance_to_linears(segment, state, targets):
                for linear in sharing:
                    found = collected.setdefault(linear.weight, make())
                    for x in ahead.inputs(segment, linear, state):
                        found.update(behind[linear](x))
        return collected

    def inputs(self, segment: Segment, linear: Linear, state: Overrides) -> Iterator[Tensor]:
        """Yield the inputs of a linear [..., K], of each batch and call, at the stop before the first call.

        Inputs of later calls come from a run ahead, which does not advance the batches.
        """
        stops = [self.position, *map(segment.nodes.index, linear.calls[1:])]
        for values in self.values:
            yield value_of(self.program, linear.source, values, state)
            if len(stops) == 1:
                continue
            ahead = SequentialRunner.of(self.program, [values])
            for (first, last), source in zip(itertools.pairwise(stops), linear.sources[1:], strict=True):
                ahead.run(segment.nodes[first:last], state)
                yield value_of(self.program, source, ahead.values[0], state)


@contextlib.contextmanager
def unpacked(linears: Iterable[Callable[..., Tensor]], dtype: torch.dtype) -> Iterator[None]:
    """Keep the weights of some linears unpacked until the `with` block ends; they multiply in `dtype`."""
    with contextlib.ExitStack() as stack:
        for linear in {id(linear): linear for linear in linears}.values():  # a linear may be called twice
            if hold := getattr(linear, "unpacked", None):
                stack.enter_context(hold(dtype))
        yield
