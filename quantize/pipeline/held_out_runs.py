"""The run says at its end what the float model, plain rounding and its result make of the rows held back.

The three models go through the blocks side by side, so that no weight is held longer than the run itself holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from quantize.calibration.logits import Divergence, divergence
from quantize.calibration.runner import SequentialRunner, unpacked
from quantize.graph.interpreter import Overrides, Values, run_nodes
from quantize.graph.linears import Linear
from quantize.graph.program import Program, Segment
from quantize.nn.prefix_tokens import PrefixTokens
from quantize.pipeline.block import Block, Product
from quantize.pipeline.held_out import HeldOutRows
from quantize.pipeline.run_figures import BlockFigures, RunFigures, hidden_state
from quantize.quantizers.rtn import RoundToNearest

LOGIT_BYTES = 1 << 27  # the most that the logits of a row may take; rows for large vocabularies are cut
Scores = dict[str, dict[str, float]]


@dataclass
class HeldOutRuns:
    """The rows that were held back, on their way through the float model, plain rounding and the quantized model.

    Plain rounding takes the weights as they are to the nearest values of the same schemes, without any pass. A prefix
    stands in front of the rows in all three models.

    Attributes:
        scratch: a directory for activations that do not fit into memory.
        scores: `loss` (nats per token) and `kl` (to the float model, nats per token), or `error` (‖y - y'‖ / ‖y'‖) of
            a model without a vocabulary, for `float`, `plain_rounding` and `quantized`; set after the last block.
        rounded_plainly: the paths of linears that lost less on these rows by plain rounding, and so got it.
        not_tuned: the blocks that lost less on these rows before they were tuned, and so stayed as they were.
        rounded_without_data: the paths of linears that no calibration row reached, and so got plain rounding.
        figures: what the run's page shows of these rows.
    """

    program: Program
    given: HeldOutRows
    prefix: PrefixTokens
    scratch: Path | None = None
    float_model: SequentialRunner = field(init=False)
    plain_rounding: SequentialRunner = field(init=False)
    quantized: SequentialRunner = field(init=False)
    scores: Scores = field(default_factory=dict)
    rounded_plainly: list[str] = field(default_factory=list)
    not_tuned: list[str] = field(default_factory=list)
    rounded_without_data: list[str] = field(default_factory=list)
    figures: RunFigures = field(default_factory=RunFigures)

    def __post_init__(self) -> None:
        behind = self.prefix.batches(self.given.batches(self.length))
        self.float_model, self.plain_rounding, self.quantized = (
            SequentialRunner(self.program, behind, self.scratch) for _ in range(3)
        )

    @property
    def length(self) -> int:
        """The number of tokens that are taken of a row."""
        return scored_length(self.program.vocabulary)

    def runners(self) -> dict[str, SequentialRunner]:
        """Return the three runners by name."""
        names = ("float_model", "plain_rounding", "quantized")
        return {f"held_out_{name}": getattr(self, name) for name in names}

    def run(self, segment: Segment, float_model: Overrides, plain_rounding: Overrides, quantized: Overrides) -> None:
        """Run a block in all three models, each with what is given; the last block is scored."""
        if not self.given.rows:
            return
        states = (float_model, plain_rounding, quantized)
        if segment is self.program.segments[-1]:
            return self._score(segment, states)
        for runner, state in zip(self.runners().values(), states, strict=True):
            runner.run(segment.nodes, state)
        return None

    def note_block(self, segment: Segment, undone: Callable[[Values], Values]) -> None:
        """Note the figures of a block that all three models have run through, unless it is the last one.

        `undone` returns values that the passes have transformed, as those of the first and the last model are, in the
        coordinates of the model that was given.
        """
        node = None if segment is self.program.segments[-1] else hidden_state(self.program, segment)
        if node is None or not self.given.rows:
            return
        found, rest = BlockFigures(), self.prefix.rest
        for float_model, plain, quantized in zip(*(runner.values for runner in self.runners().values()), strict=True):
            expected, y = (undone({node: values[node]})[node] for values in (float_model, quantized))
            found.update(*(rest(x).flatten(0, -2) for x in (expected, plain[node], y, float_model[node])))
        self.figures.blocks[segment.name] = found.record()

    def _score(self, segment: Segment, states: Sequence[Overrides]) -> None:
        """Run the last block row by row, since the logits of all rows may not fit into memory."""
        found = {"plain_rounding": Divergence(), "quantized": Divergence()}
        errors, runners = dict.fromkeys(found, 0.0), list(self.runners().values())
        for number in range(len(self.given.rows)):
            expected = last_output(self.program, segment, runners[0].values[number], states[0])
            for name, runner, state in zip(found, runners[1:], states[1:], strict=True):
                y = last_output(self.program, segment, runner.values[number], state)
                if y.dim() != 3 or y.shape[-1] != self.program.vocabulary:
                    errors[name] = max(errors[name], relative_error(y, expected))
                    continue
                labels = self._next_tokens(number)
                scored = slice(-len(labels) - 1, -1)
                found[name] += divergence(y[0, scored], expected[0, scored], labels)
        self.scores = self._means(found) if found["quantized"].tokens else {k: {"error": v} for k, v in errors.items()}

    def _means(self, found: Mapping[str, Divergence]) -> Scores:
        scores = {name: {"kl": each.mean("kl")} for name, each in found.items()}
        if self.given.generates:
            for name, each in found.items():
                scores[name]["loss"] = each.mean("loss")
            scores["float"] = {"loss": found["quantized"].mean("reference_loss")}
        return scores

    def _next_tokens(self, number: int) -> Tensor:
        row = next(x for x in self.given.rows[number].values() if not x.is_floating_point())
        return row[1 : None if self.given.whole else self.length].to(self.program.device)


def last_output(program: Program, segment: Segment, values: Values, state: Overrides) -> Tensor:
    """Return the first output of a batch in front of the last block, [B, tokens, V] of a model with a vocabulary."""
    values = dict(values)
    with unpacked(state.linears.values(), state.product_dtype):
        run_nodes(program, segment.nodes, values, state)
    output: Tensor = values[program.output.all_input_nodes[0]]
    return output


def scored_length(vocabulary: int) -> int:
    """Return how many tokens of a row may have logits over a vocabulary."""
    return max(2, LOGIT_BYTES // 4 // vocabulary)


def rounded_to_nearest(block: Block) -> Block:
    """Return a block whose linears, but experts that it does not hold, are rounded to nearest as they are."""
    found = dict[Linear, Product]()
    for linear, scheme in ((x, scheme) for x, scheme in block.schemes.items() if x not in block.apart):
        weight = RoundToNearest().quantize(block.weight(linear), scheme.weights, None, block.dtypes[linear.weight])
        found[linear] = block.quantize(linear, weight, PrefixTokens())
    return replace(block, quantized=found)


def relative_error(y: Tensor, expected: Tensor) -> float:
    """Return ‖y - y'‖ / ‖y'‖."""
    return float((y.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300))
