"""A model that draws random numbers in every pass gives no output that another could be compared with."""

from __future__ import annotations

import torch
from torch import fx

from quantize.graph.program import Program
from quantize.graph.rules.table import name_of

ONLY_IN_TRAINING = ("dropout", "attention", "gru", "lstm", "rnn", "rrelu")  # operators that may draw, and here do not


def drawing(program: Program) -> str:
    """Return which operator of a program draws random numbers; '' if none does."""
    return next((f"`{name_of(node)}`" for node in program.module.graph.nodes if draws(node)), "")


def draws(node: fx.Node) -> bool:
    """Return whether an operator draws random numbers in evaluation mode."""
    known = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
    return known and not any(part in name_of(node) for part in ONLY_IN_TRAINING)
