"""Which tokens stand in front of every sequence: those of the recipe, or those found to carry massive activations."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, fx, nn

from quantize.calibration.data import BATCH_TOKENS, Samples
from quantize.calibration.massive import UPPER, hidden_states, outlier_ratios, rows_are_tokens
from quantize.calibration.runner import SequentialRunner
from quantize.checkpoint.checkpoint import Checkpoint
from quantize.checkpoint.tokenizer import bos_token
from quantize.errors import UsageError
from quantize.graph.interpreter import Overrides
from quantize.graph.program import Program
from quantize.pipeline.memoize import Once, always
from quantize.pipeline.plan import Plan
from quantize.pipeline.progress import track
from quantize.recipe.recipe import PrefixArgs


def check_prefix(plan: Plan, program: Program, checkpoint: Checkpoint, model: nn.Module) -> None:
    """A prefix can stand in front of what the model is given.

    Raises:
        UsageError: the model is no causal language model of transformers, its linears do not run token by token, or
            the ids or the windows do not fit it.
    """
    prefix = plan.recipe.prefix
    if prefix is None:
        return
    if (why := unsupported_reason(program, checkpoint, model)) is not None:
        raise UsageError(f"recipe: a prefix needs a causal language model of transformers, and {why}; leave it out")
    if prefix.tokens and max(prefix.tokens) >= program.vocabulary:
        raise UsageError(
            f"recipe: prefix: the token id {max(prefix.tokens)} is none; the model knows 0 to {program.vocabulary - 1}"
        )
    linears = [x for segment in program.segments for x in program.linears(segment) if x.path in plan.targets]
    odd = [linear.path for linear in linears if not rows_are_tokens(program, linear.source)]
    if odd:
        raise UsageError(f"recipe: a prefix needs linears that run token by token; --ignore {odd[0]}, or leave it out")


def unsupported_reason(program: Program, checkpoint: Checkpoint, model: nn.Module) -> str | None:
    """Why a model is no causal language model, as part of a sentence; None if it is one."""
    if not checkpoint.config:
        return "the model is a module of its own"
    if program.export_error:
        return "the model cannot be exported"
    if list(program.inputs) != ["input_ids"] or not getattr(model, "can_generate", lambda: False)():
        return "the model does not generate from input_ids alone"
    sizes = [int(node.meta["val"].shape[-1]) for node in program.output.all_input_nodes]
    return None if sizes == [program.vocabulary] else "the model's output does not score the vocabulary"


@dataclass(frozen=True)
class OutlierTokens:
    """What the token rule flags in a float model.

    Attributes:
        counts: token id → how often, at any block output or input of a linear; the first of a sequence counts as BOS.
        sequences: how many were looked at.
    """

    counts: Counter[int]
    sequences: int

    @property
    def per_sequence(self) -> float:
        """Flagged tokens of a sequence, in the mean."""
        return self.counts.total() / self.sequences

    @property
    def tokens(self) -> tuple[int, ...]:
        """The most frequent ids, as many as tokens are flagged in a sequence, rounded up."""
        ranked = sorted(self.counts, key=lambda token: (-self.counts[token], token))
        return tuple(ranked[: math.ceil(self.per_sequence)])


def resolve_prefix(
    plan: Plan,
    program: Program,
    checkpoint: Checkpoint,
    samples: Samples,
    console: Console | None,
    once: Once = always,
) -> tuple[Plan, dict[str, Any]]:
    """The plan with the ids of its prefix, and what the manifest says of them; {} where none is asked for."""
    prefix = plan.recipe.prefix
    if prefix is None or not prefix.search:
        return plan, {} if prefix is None else {"tokens": list(prefix.tokens), "searched": False}
    batches = samples.batches(max(1, BATCH_TOKENS // plan.recipe.seqlen))
    ids = [batch["input_ids"] for batch in batches]

    def find() -> tuple[dict[int, int], int]:
        found = find_prefix(checkpoint, program, ids, console)
        return dict(found.counts), found.sequences

    flagged, sequences = once("prefix", find)
    found = OutlierTokens(Counter(flagged), sequences)
    settled = PrefixArgs(tokens=found.tokens) if found.tokens else None
    recipe = plan.recipe.model_copy(update={"prefix": settled})
    counts = {str(token): n for token, n in found.counts.most_common()}
    record = {"flagged_per_sequence": found.per_sequence, "flagged": counts}
    return replace(plan, recipe=recipe), {"tokens": list(found.tokens), "searched": True} | record


def find_prefix(
    checkpoint: Checkpoint, program: Program, batches: Sequence[Tensor], console: Console | None
) -> OutlierTokens:
    """Run the float model on token ids [B, T], block by block, and note the tokens of R > 64 (arXiv 2410.05265, eq. 4).

    Tokens far below the rest (1 / R > 8) are left out: each token has a grid of its own, so they harm nothing, and at
    gated inputs there are some in any text.
    """
    runner, masks = SequentialRunner(program, batches), [torch.zeros_like(ids, dtype=torch.bool) for ids in batches]
    for segment in track(program.segments, "looking for massive activations in", lambda s: s.name, console):
        state = Overrides({name: checkpoint.tensor(name).float() for name in segment.parameters})
        linears = [x for x in program.linears(segment) if rows_are_tokens(program, x.source)]
        for group in runner.advance_to_linears(segment, state, linears):
            flag_tokens(runner, group[0].source, masks)
        for node in hidden_states(program, segment):
            flag_tokens(runner, node, masks)
    counted, bos = [ids.clone() for ids in batches], bos_token(checkpoint.directory)
    if bos is not None:
        for ids in counted:
            ids[:, 0] = bos
    flags = (ids[mask].tolist() for ids, mask in zip(counted, masks, strict=True))
    return OutlierTokens(Counter(token for tokens in flags for token in tokens), sum(map(len, batches)))


def flag_tokens(runner: SequentialRunner, node: fx.Node, masks: Sequence[Tensor]) -> None:
    """Add to the masks [B, T] the tokens that are flagged in a value."""
    for values, mask in zip(runner.values, masks, strict=True):
        mask |= outlier_ratios(values[node].reshape(*mask.shape, -1)) > UPPER
