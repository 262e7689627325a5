"""Before a run with a prefix, the model must accept tokens in front of its inputs."""

from __future__ import annotations

from torch import nn

from quantize.calibration.massive import rows_are_tokens
from quantize.checkpoint.checkpoint import Checkpoint
from quantize.errors import UsageError
from quantize.graph.program import Program
from quantize.pipeline.plan import Plan


def check_prefix(plan: Plan, program: Program, checkpoint: Checkpoint, model: nn.Module) -> None:
    """Check that a prefix can stand in front of the model's inputs.

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
            f"recipe: prefix: the model has no token id {max(prefix.tokens)}; "
            f"give ids from 0 to {program.vocabulary - 1}"
        )
    linears = [x for x in program.all_linears if x.weight in plan.reader_schemes and x.experts is None]
    odd = [linear.path for linear in linears if not all(rows_are_tokens(program, x) for x in linear.sources)]
    if odd:
        raise UsageError(f"recipe: a prefix needs linears that run token by token; --ignore {odd[0]}, or leave it out")


def unsupported_reason(program: Program, checkpoint: Checkpoint, model: nn.Module) -> str | None:
    """Return why a model is no causal language model, as a part of a sentence, or None if it is one."""
    if not checkpoint.config:
        return "the model is a module of its own"
    if program.export_error:
        return "the model cannot be exported"
    if list(program.inputs) != ["input_ids"] or not getattr(model, "can_generate", lambda: False)():
        return "the model does not generate from input_ids alone"
    sizes = [int(node.meta["val"].shape[-1]) for node in program.output.all_input_nodes]
    return None if sizes == [program.vocabulary] else "the model's output does not score the vocabulary"
