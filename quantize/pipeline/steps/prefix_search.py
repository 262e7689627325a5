"""The tokens of the prefix are those of the recipe, or those that carry massive activations in the float model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, fx

from quantize.calibration.data import BATCH_TOKENS
from quantize.calibration.massive import UPPER, hidden_states, outlier_ratios, rows_are_tokens
from quantize.calibration.runner import SequentialRunner
from quantize.checkpoint.checkpoint import Checkpoint
from quantize.checkpoint.tokenizer import bos_token
from quantize.graph.interpreter import Overrides
from quantize.graph.program import Program
from quantize.pipeline.context import RunContext
from quantize.pipeline.plan import Plan
from quantize.pipeline.prepare import Prepared
from quantize.pipeline.progress import track
from quantize.recipe.fields import PrefixArgs


@dataclass(frozen=True)
class OutlierTokens:
    """The tokens that the rule of outliers flags in a float model.

    Attributes:
        counts: token id → how often it was flagged, at any block output or input of a linear; the first token of a
            sequence counts as BOS.
        sequences: the number of sequences.
    """

    counts: Counter[int]
    sequences: int

    @property
    def per_sequence(self) -> float:
        """The mean number of flagged tokens in a sequence."""
        return self.counts.total() / self.sequences

    @property
    def tokens(self) -> tuple[int, ...]:
        """The most frequent ids; their number is the mean number of flagged tokens in a sequence, rounded up."""
        ranked = sorted(self.counts, key=lambda token: (-self.counts[token], token))
        return tuple(ranked[: math.ceil(self.per_sequence)])


def resolve_prefix(prepared: Prepared, context: RunContext) -> tuple[Plan, dict[str, Any]]:
    """Return the plan with the ids of its prefix, and the manifest's entry for it, which is {} without a prefix."""
    plan, samples = prepared.plan, prepared.samples
    prefix = plan.recipe.prefix
    if prefix is None or not prefix.search:
        return plan, {} if prefix is None else {"tokens": list(prefix.tokens), "searched": False}
    batches = samples.batches(max(1, BATCH_TOKENS // plan.recipe.seqlen))
    ids = [batch["input_ids"] for batch in batches]

    def find() -> tuple[dict[int, int], int]:
        found = find_prefix(prepared.checkpoint, prepared.program, ids, context.console)
        return dict(found.counts), found.sequences

    flagged, sequences = context.cached("prefix", find)
    found = OutlierTokens(Counter(flagged), sequences)
    tokens = ordered(found.tokens, [x.id for x in samples.leading])
    settled = PrefixArgs(tokens=tokens) if tokens else None
    recipe = plan.recipe.model_copy(update={"prefix": settled})
    counts = {str(token): n for token, n in found.counts.most_common()}
    record = {"flagged_per_sequence": found.per_sequence, "flagged": counts}
    return replace(plan, recipe=recipe), {"tokens": list(tokens), "searched": True} | record


def ordered(tokens: tuple[int, ...], leading: Sequence[int]) -> tuple[int, ...]:
    """Return tokens with those that every text begins with last, so that texts go on where the prefix ends."""
    return (*(x for x in tokens if x not in leading), *(x for x in leading if x in tokens))


def find_prefix(
    checkpoint: Checkpoint, program: Program, batches: Sequence[Tensor], console: Console | None
) -> OutlierTokens:
    """Run the float model on token ids [B, T], block by block, and count the tokens of R > 64.

    The rule is equation 4 of arXiv 2410.05265. Tokens far below the rest (1 / R > 8) are not counted: each token has
    its own grid, so they do no harm, and at gated inputs any text has some.
    """
    runner, masks = SequentialRunner(program, batches), [torch.zeros_like(ids, dtype=torch.bool) for ids in batches]
    for segment in track(program.segments, "looking for massive activations in", lambda s: s.name, console):
        state = Overrides({name: checkpoint.tensor(name).float() for name in segment.parameters})
        linears = [x for x in program.linears(segment) if x.experts is None and rows_are_tokens(program, x.source)]
        for sharing in runner.advance_to_linears(segment, state, linears):
            flag_tokens(runner, sharing[0].source, masks)
        for node in hidden_states(program, segment):
            flag_tokens(runner, node, masks)
    counted, bos = [ids.clone() for ids in batches], bos_token(checkpoint.directory)
    if bos is not None:
        for ids in counted:
            ids[:, 0] = bos
    flags = (ids[mask].tolist() for ids, mask in zip(counted, masks, strict=True))
    return OutlierTokens(Counter(token for tokens in flags for token in tokens), sum(map(len, batches)))


def flag_tokens(runner: SequentialRunner, node: fx.Node, masks: Sequence[Tensor]) -> None:
    """Add the tokens that are flagged in a value to the masks [B, T]."""
    for values, mask in zip(runner.values, masks, strict=True):
        mask |= outlier_ratios(values[node].reshape(*mask.shape, -1)) > UPPER
