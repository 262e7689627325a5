"""Linears and tables: parameters read channels and write new ones."""

from __future__ import annotations

from torch import Tensor, fx

from quantize.graph.group import Group
from quantize.graph.labels import Event, Walk, last_axis
from quantize.graph.rules.movement import origin
from quantize.graph.rules.table import SOURCES, arguments, pin_all, rule


@rule("linear", kind=SOURCES)
def linear(walk: Walk, node: fx.Node) -> None:
    """A linear y = x Wᵀ + b: W reads the channels of x with its columns and writes new ones with its rows."""
    x, weight, *rest = arguments(node)
    name = walk.parameter(weight)
    if name is None:
        return pin_all(walk, node, "it is multiplied with a matrix that is no parameter")
    ids = read_channels(walk, x)
    if ids is not None:
        walk.events.append(Event(ids, parameter=name, axis=1, reads=True))
    written = walk.fresh(node)
    walk.events.append(Event(written, parameter=name, axis=0))
    if rest and (bias := walk.parameter(rest[0])):
        walk.events.append(Event(written, parameter=bias, axis=0))


def read_channels(walk: Walk, x: fx.Node) -> Tensor | None:
    """The channels in front of a linear; an input that no weight writes is given channels pinned from birth."""
    if x in walk.squares:
        walk.pin(x, "its square is read by a weight")
    elif x not in walk.labels:
        walk.restrict(walk.fresh(x), Group.NONE, f"no weight writes it: it is {origin(x)}")
    if x not in walk.labels:
        return None
    if (ids := last_axis(walk.labels[x])) is None:
        walk.pin(x, "a weight reads other channels of it at other positions")
    return ids


@rule("embedding", kind=SOURCES)
def embedding(walk: Walk, node: fx.Node) -> None:
    """A table writes new channels with its columns."""
    if name := walk.parameter(arguments(node)[0]):
        walk.events.append(Event(walk.fresh(node), parameter=name, axis=1))


def gain(walk: Walk, node: fx.Node, known: fx.Node, name: str) -> None:
    """A parameter vector scales the channels: it reads them and writes new ones, unless it was folded to ones."""
    if name in walk.folded:
        walk.labels[node] = walk.labels[known]
    elif (ids := last_axis(walk.labels[known])) is None:
        walk.pin(known, f"the gain `{name}` scales more than one axis of it")
    else:
        reason = f"the gain `{name}` scales its channels one by one"
        walk.events.append(Event(ids, Group.DIAGONAL, reason, parameter=name, reads=True, vector=True))
        reason = f"it is written by the gain `{name}`, which can only scale"
        walk.events.append(Event(walk.fresh(node), Group.DIAGONAL, reason, parameter=name, vector=True))
