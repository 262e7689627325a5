"""How rules are found: one table from operator name to rule. An operator without a rule pins what it touches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from quantize.graph.labels import Walk, last_axis

Rule = Callable[[Walk, fx.Node], None]
RULES: dict[str, Rule] = {}
SOURCES: set[Rule] = set()  # rules that make channels even where no input has any
TRANSPARENT: set[Rule] = set()  # rules of operators that compute nothing


def rule(*names: str, kind: set[Rule] | None = None) -> Callable[[Rule], Rule]:
    """Register a rule for operators by name, all overloads; `kind` is one of the sets above."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        if kind is not None:
            kind.add(function)
        return function

    return register


def name_of(node: fx.Node) -> str:
    """`linear` for `aten.linear.default`."""
    target: Any = node.target
    return str(getattr(target, "overloadpacket", getattr(target, "__name__", target))).rsplit(".", 1)[-1]


def arguments(node: fx.Node) -> Any:
    """Positional arguments of an operator, whose types its schema knows and the type checker does not."""
    return node.args


def visit(walk: Walk, node: fx.Node) -> None:
    """Apply the rule of a node that touches channels; one without a rule pins all it touches."""
    touched = [n for n in node.all_input_nodes if n in walk.labels or n in walk.squares]
    apply = RULES.get(name_of(node))
    if apply is not None and (touched or apply in SOURCES):
        apply(walk, node)
    elif touched:
        for source in touched:
            walk.pin(source, f"`{name_of(node)}` has no rule")
    labels = walk.labels.get(node)
    if isinstance(labels, Tensor) and labels.dim() and (ids := last_axis(labels)) is not None:
        walk.at[node] = ids


def pin_all(walk: Walk, node: fx.Node, reason: str) -> None:
    """Pin every basis that a node touches."""
    for source in node.all_input_nodes:
        walk.pin(source, reason)
