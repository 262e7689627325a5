"""What each expert adds to its layer's output on the calibration data, and the loss of the float model beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.calibration.data import BATCH_TOKENS
from quantize.calibration.runner import SequentialRunner
from quantize.graph.experts import expert_rows
from quantize.graph.interpreter import Overrides, Values
from quantize.graph.mixtures import Mixture, find_mixtures
from quantize.graph.program import Segment
from quantize.nn.prefix_tokens import PrefixTokens
from quantize.pipeline.context import RunContext
from quantize.pipeline.held_out_runs import HeldOutRuns
from quantize.pipeline.prepare import Prepared
from quantize.pipeline.progress import track


@dataclass(frozen=True)
class Saliency:
    """What the calibration data say of the experts, by the path of the mixture.

    Attributes:
        norms: Σ g ‖f(x)‖₂ over the tokens that the router sends to an expert, where f(x) is its output and g the weight
            that multiplies it in the model: one number for each expert.
        tokens: how many tokens each expert saw.
        loss: the float model's loss on the rows held back, in nats per token; None if it predicts no tokens.
    """

    norms: dict[str, list[float]]
    tokens: dict[str, list[int]]
    loss: float | None

    def scores(self, path: str) -> Tensor:
        """Return the saliency of each expert of a mixture, the mean of g ‖f(x)‖₂, [E]; 0 for one that saw no token."""
        norms, tokens = (torch.tensor(found[path], dtype=torch.float64) for found in (self.norms, self.tokens))
        return norms / tokens.clamp(min=1)


def collect_saliency(prepared: Prepared, context: RunContext, rows: bool = True) -> Saliency:
    """Run the float model block by block; without `rows` on the rows held back alone, for the loss."""
    checkpoint, program, samples = prepared.checkpoint, prepared.program, prepared.samples
    given = samples.batches(max(1, BATCH_TOKENS // prepared.plan.recipe.seqlen)) if rows else []
    runner = SequentialRunner(program, context.ranks.shard(given), context.scratch)
    held_out, found = HeldOutRuns(program, prepared.held_out, PrefixTokens()), Saliency({}, {}, None)
    for segment in track(program.segments, "measuring experts of", lambda s: s.name, context.console):
        state = Overrides({n: checkpoint.float_tensor(n).to(context.device) for n in segment.parameters})
        for mixture, norms, tokens in measured(runner, segment, state) if rows else ():
            found.norms[mixture.path] = norms.tolist()
            found.tokens[mixture.path] = tokens.tolist()
        held_out.run(segment, state, state, state)
    sums, seen = added(context.ranks.gather(found.norms)), added(context.ranks.gather(found.tokens))
    counts = {path: [int(count) for count in each] for path, each in seen.items()}
    return Saliency(sums, counts, held_out.scores.get("float", {}).get("loss"))


def added(of_ranks: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """Return the sums over ranks of the numbers at the same place."""
    return {path: [sum(each) for each in zip(*(own[path] for own in of_ranks), strict=True)] for path in of_ranks[0]}


def measured(runner: SequentialRunner, segment: Segment, state: Overrides) -> Iterator[tuple[Mixture, Tensor, Tensor]]:
    """Advance through a segment and yield each mixture with its experts' norms float64 [E] and tokens int64 [E]."""
    done = 0
    for mixture in find_mixtures(runner.program, segment):
        first, last = (segment.nodes.index(node) for node in (mixture.stacks[0].node, mixture.outputs))
        runner.run(segment.nodes[done:first], state)
        seen = [rows_of_experts(mixture, values) for values in runner.values]
        runner.run(segment.nodes[first : last + 1], state)
        norms, tokens = torch.zeros(mixture.count, dtype=torch.float64), torch.zeros(mixture.count, dtype=torch.int64)
        for rows, values in zip(seen, runner.values, strict=True):
            y = values[mixture.outputs]
            for expert, chosen in rows:
                of_expert = y[chosen] if mixture.stacks[0].offsets is not None else y[expert][chosen]
                norms[expert] += float(of_expert.norm(dim=-1).sum(dtype=torch.float64))
                tokens[expert] += len(of_expert)
        done = last + 1
        yield mixture, norms, tokens
    runner.run(segment.nodes[done:], state)


def rows_of_experts(mixture: Mixture, values: Values) -> list[tuple[int, slice | Tensor]]:
    """Return each expert with its rows, in front of the mixture; rows of zeros are of tokens not routed to it."""
    first = mixture.stacks[0]
    if first.offsets is not None:
        return list(expert_rows(values[first.offsets]))
    return [(expert, x.any(dim=-1)) for expert, x in enumerate(values[first.source])]
