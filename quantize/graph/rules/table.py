"""One table maps operator names to rules. An operator without a rule pins what it touches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx
from torch.fx.node import map_arg

from quantize.errors import reason
from quantize.graph.labels import ChannelTrace, varying

Rule = Callable[[ChannelTrace, fx.Node], None]
RULES: dict[str, Rule] = {}
SOURCES: set[Rule] = set()  # rules that make channels even where no input has any
TRANSPARENT: set[Rule] = set()  # rules of operators that compute nothing
OPERANDS: dict[Rule, int] = {}  # how many arguments a rule looks at; channels in other arguments are pinned


def rule(*names: str, operands: int = 1, kind: set[Rule] | None = None) -> Callable[[Rule], Rule]:
    """Register a rule for operators by name, all overloads.

    Args:
        names: the names of the operators.
        operands: the number of leading arguments that the rule looks at.
        kind: one of the sets above, to which the rule is added.
    """

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        OPERANDS[function] = operands
        if kind is not None:
            kind.add(function)
        return function

    return register


def name_of(node: fx.Node) -> str:
    """Return an operator's name, such as `linear` for `aten.linear.default`."""
    target: Any = node.target
    return str(getattr(target, "overloadpacket", getattr(target, "__name__", target))).rsplit(".", 1)[-1]


def arguments(node: fx.Node) -> Any:
    """Return an operator's positional arguments, whose types its schema knows and the type checker does not."""
    return node.args


def visit(walk: ChannelTrace, node: fx.Node) -> None:
    """Apply the rule of a node that touches channels; what no rule looks at is pinned."""
    touched = [n for n in node.all_input_nodes if walk.touches(n)]
    apply = RULES.get(name_of(node))
    looked_at: list[fx.Node] = []
    if apply is not None:
        map_arg(node.args[: OPERANDS[apply]], looked_at.append)
    for source in (n for n in touched if n not in looked_at):
        walk.pin(source, f"`{name_of(node)}` has no rule" if apply is None else f"`{name_of(node)}` takes it aside")
    if apply is not None and (any(n in looked_at for n in touched) or apply in SOURCES):
        try_rule(walk, node, apply)
    finish(walk, node)


def try_rule(walk: ChannelTrace, node: fx.Node, apply: Rule) -> None:
    """Apply a rule; an operator that is used in a form the rule does not know pins all it touches."""
    try:
        apply(walk, node)
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        pin_all(walk, node, f"`{name_of(node)}` is used in a form that is not known ({reason(error)})")
        walk.pin(node, "what writes it is not understood")


def finish(walk: ChannelTrace, node: fx.Node) -> None:
    """Note which parameters the node took as values, and where the channels of its own value lie.

    The labels are kept without the axes along which they do not change, because a large model has many labels.
    """
    values = (walk.view(n) for n in node.all_input_nodes if n in walk.labels)
    walk.accounted |= {(node, view.name) for view in values if view}
    labels = walk.labels.get(node)
    if isinstance(labels, Tensor) and labels.dim():
        distinct = varying(labels).contiguous()
        walk.labels[node] = distinct.expand(labels.shape)
        axes = tuple(d for d, size in enumerate(distinct.shape) if size > 1) or (labels.dim() - 1,)
        walk.at[node] = axes, distinct.reshape(-1)


def pin_all(walk: ChannelTrace, node: fx.Node, reason: str) -> None:
    """Pin every basis that a node touches."""
    for source in node.all_input_nodes:
        walk.pin(source, reason)
