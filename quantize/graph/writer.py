"""Nodes are added to an exported graph with the values that the exporter would have given them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

ATEN = torch.ops.aten


@dataclass(frozen=True)
class Writer:
    """Adds nodes where the graph inserts.

    Attributes:
        graph: the graph.
        like: the node whose module the new ones belong to.
    """

    graph: fx.Graph
    like: fx.Node

    def add(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Add a node that calls a function."""
        node = self.graph.call_function(target, args, kwargs)
        held_args, held_kwargs = map_aggregate((args, kwargs), lambda x: x.meta["val"] if isinstance(x, fx.Node) else x)
        node.meta = {key: x for key, x in self.like.meta.items() if key != "val"}
        with torch.no_grad():
            node.meta["val"] = target(*held_args, **held_kwargs)
        return node

    def size(self, node: fx.Node, axis: int) -> Any:
        """Return the size of an axis, as a number or as a node."""
        found = node.meta["val"].shape[axis]
        return found if isinstance(found, int) else self.add(ATEN.sym_size.int, node, axis % node.meta["val"].dim())

    def squeezed(self, x: fx.Node, axis: int) -> fx.Node:
        """Drop an axis of size one; where it was just put in, that is what was before."""
        added: Any = x.args[1] if x.target is ATEN.unsqueeze.default else None
        if added is not None and added % x.meta["val"].dim() == axis:
            return x.all_input_nodes[0]
        x = self.add(ATEN.squeeze.dim, x, axis)
        return x

    def permuted(self, x: fx.Node, letters: str, wanted: str) -> fx.Node:
        """Bring axes, each with a letter, into another order."""
        if letters != wanted:
            x = self.add(ATEN.permute.default, x, [letters.index(a) for a in wanted])
        return x

    def expanded(self, x: fx.Node, letters: str, wanted: str, like: fx.Node) -> fx.Node:
        """Repeat x [*letters, …] along axes of `wanted` that it lacks, which have the sizes of `like` [*wanted]."""
        if letters == wanted:
            return x
        for place, letter in enumerate(wanted):
            x = x if letter in letters else self.add(ATEN.unsqueeze.default, x, place)
        sizes = [-1 if a in letters else self.size(like, n) for n, a in enumerate(wanted)]
        x = self.add(ATEN.expand.default, x, [*sizes, *[-1] * (x.meta["val"].dim() - len(wanted))])
        return x

    def sorted(self, numbers: fx.Node, count: Any) -> tuple[fx.Node, fx.Node]:
        """Return the order int64 [S] that sorts numbers below `count`, and where those of each end, int64 [count]."""
        flat = self.add(ATEN.flatten.using_ints, numbers)
        both = self.add(ATEN.sort.stable, flat, stable=True)
        values, order = (self.add(operator.getitem, both, n) for n in range(2))
        all_numbers = self.add(ATEN.cumsum.default, self.add(ATEN.new_ones.default, values, [count]), 0)
        return order, self.add(ATEN.searchsorted.Tensor, values, all_numbers)
