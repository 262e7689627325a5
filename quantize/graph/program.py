"""A program is a model's exported graph, cut into blocks, with names of parameters and no weight in memory."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from quantize.graph.experts import CASTS, consumers, find_experts, read_otherwise, routers, token_index, turned
from quantize.graph.linears import (
    ATEN,
    NOT_ALONE,
    STACK,
    STACK_READ,
    VIEWS,
    Linear,
    by_weight,
    find_linear,
    not_replaceable,
    stacks,
)
from quantize.graph.rules.table import name_of

MOVES = {ATEN.transpose.int, ATEN.slice.Tensor, ATEN.clone.default, ATEN.detach.default, ATEN.alias.default}
MOVES |= {getattr(ATEN.to, name) for name in ("dtype", "dtype_layout", "device", "other")} | {ATEN._to_copy.default}


@dataclass(frozen=True)
class Segment:
    """A run of nodes that belongs to one repeated block, or to what stands before, between or after blocks.

    Attributes:
        name: the module path of the block (`model.layers.3`), or a name for what stands around blocks.
        nodes: the nodes in execution order.
        parameters: the names of the parameters that the nodes read, in that order.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """The exported graph of one forward pass.

    Attributes:
        module: the graph; its placeholders are parameters, buffers and inputs.
        parameters: placeholder → parameter name, tied parameters apart.
        buffers: placeholder → value.
        constants: placeholder → value of the inputs that are switches (`use_cache`).
        inputs: argument of forward → its placeholder, the main input first.
        segments: all other nodes but the output, in order.
        output: the node that returns.
        intermediate_outputs: outputs that are no result, such as an encoder's states, which the decoder reads.
        asked_for_more: the names of weights of which the model asks for more than their product, each with the reason.
        embeddings: the names of the tables whose module looks up rows and reads its table in no other way.
        ties: parameter → all names of the same parameter of the model, itself among them.
        unreached: the names of parameters that this pass does not read, and another could, as it takes more arguments.
        batch: the number of samples that run together; None for any.
        export_error: why the exporter refused the model, whose graph then holds its linears alone; empty otherwise.
        device: where the graph runs.
    """

    module: fx.GraphModule
    parameters: dict[fx.Node, str]
    buffers: dict[fx.Node, Tensor]
    constants: dict[fx.Node, Any]
    inputs: dict[str, fx.Node]
    segments: tuple[Segment, ...]
    output: fx.Node
    intermediate_outputs: frozenset[fx.Node] = frozenset()
    asked_for_more: Mapping[str, str] = field(default_factory=dict)
    embeddings: frozenset[str] = frozenset()
    ties: Mapping[str, Sequence[str]] = field(default_factory=dict)
    unreached: frozenset[str] = frozenset()
    batch: int | None = None
    export_error: str = ""
    device: torch.device = torch.device("cpu")  # noqa: RUF009  immutable

    def to(self, device: torch.device) -> Self:
        """Return the program as it runs on a device; its graph is changed in place."""
        name_device(self.module, device)
        return replace(self, device=device, buffers={node: x.to(device) for node, x in self.buffers.items()})

    @property
    def export_error_message(self) -> str:
        """A line to show that says what it means that the model cannot be exported."""
        return f"the model cannot be exported ({self.export_error}): only online transforms are used"

    def export_record(self) -> dict[str, object]:
        """Return plain data for JSON: whether the model could be exported, and why not."""
        return {"exported": not self.export_error, "reason": self.export_error}

    @property
    def vocabulary(self) -> int:
        """The rows of the smallest table that token ids index, which they lie below.

        Token ids are the main input, the integers [batch, tokens] that come first, and what a decoder starts from.
        """
        bounds = self.bounds
        ids = [name for name in bounds if self.inputs[name].meta["val"].dim() > 1]
        return min((bounds[name] for name in {*ids[:1], "decoder_input_ids"} & {*ids}), default=2**31)

    @functools.cached_property
    def bounds(self) -> dict[str, int]:
        """Input → the rows of the smallest table that it indexes, for inputs that index one."""
        found: dict[str, int] = {}
        for lookup, name in self._lookups.items():
            found[name] = min(rows(lookup), found.get(name, 2**31))
        return {name: found[name] for name in self.inputs if name in found}

    @functools.cached_property
    def word_tables(self) -> dict[str, list[fx.Node]]:
        """The tables of the vocabulary that nothing but lookups of token ids reads, by name, each with its lookups."""
        found: dict[str, list[fx.Node]] = {}
        for lookup in self._lookups:
            name = self.parameters.get(table := lookup.args[0], "")  # type: ignore[arg-type]
            alone = all(user in self._lookups and user.args[1] is not table for user in table.users)  # type: ignore[union-attr]
            if name in self.embeddings and alone and rows(lookup) == self.vocabulary:
                found.setdefault(name, []).append(lookup)
        return found

    @functools.cached_property
    def _lookups(self) -> dict[fx.Node, str]:
        """The nodes that look up rows by an input, as it is, in another shape, or on another device, and its name."""
        ids, found = {node: name for name, node in self.inputs.items()}, dict[fx.Node, str]()
        for node in self.module.graph.nodes:
            if (node.target in VIEWS | MOVES or name_of(node) in CASTS) and node.args[0] in ids:
                ids[node] = ids[node.args[0]]
            if node.target is ATEN.embedding.default and node.args[1] in ids:
                found[node] = ids[node.args[1]]
        return found

    def linears(self, segment: Segment) -> list[Linear]:
        """Return the linears of a segment that a quantized linear can stand in for, in order, each once."""
        found = by_weight(self._linears[node] for node in segment.nodes if node in self._linears)
        return [linear for linear in found if linear.weight not in self.not_replaceable]

    @property
    def all_linears(self) -> list[Linear]:
        """The linears that a quantized linear can stand in for, in order."""
        return [linear for segment in self.segments for linear in self.linears(segment)]

    @functools.cached_property
    def not_replaceable(self) -> dict[str, str]:
        """The weights of all other linears, and stacks of weights, with the reason why nothing stands in for them."""
        found = self._linears.values()
        experts = {linear.weight for linear in found if linear.experts is not None}
        more = not_replaceable(self.module.graph, (x for x in found if x.experts is None), self.parameters)
        return (
            dict(self.asked_for_more)
            | dict.fromkeys(more, NOT_ALONE)
            | dict.fromkeys(stacks(self.parameters) - experts, STACK)
            | dict.fromkeys(read_otherwise(found, self.parameters), STACK_READ)
        )

    @functools.cached_property
    def routers(self) -> frozenset[str]:
        """The paths of linears that choose the experts of a token, in segments that have experts."""
        found = set[str]()
        for segment in self.segments:
            linears = {linear.node: linear for linear in self.linears(segment)}
            if any(linear.experts is not None for linear in linears.values()):
                found |= {linears[node].path for node in routers(segment.nodes, self._linears) if node in linears}
        return frozenset(found)

    @functools.cached_property
    def towers(self) -> frozenset[str]:
        """The paths of linears that images or sound reach and no token does, if token ids are the main input.

        In a language model these are the towers whose outputs take the place of words.
        """
        main, *others = self.inputs.values()
        seen = {node for node in others if is_media(node.meta["val"])}
        if next(iter(self.inputs)) not in self.bounds or not seen:
            return frozenset()
        tokens = {main}
        for node in self.module.graph.nodes:
            for found in (tokens, seen):
                if not found.isdisjoint(node.all_input_nodes):
                    found.add(node)
        linears = (linear for linear in self._linears.values() if linear.source in seen - tokens)
        return frozenset(linear.path for linear in linears)

    @functools.cached_property
    def turned_stacks(self) -> frozenset[fx.Node]:
        """The nodes that turn the weights of experts around in front of their products, and compute nothing."""
        names = {linear.weight for linear in self._linears.values() if linear.experts is not None}
        return frozenset(n for node, name in self.parameters.items() if name in names for n in turned(node))

    def readers(self, weight: str) -> set[fx.Node]:
        """Return the nodes that compute with a parameter."""
        found = (node for node, name in self.parameters.items() if name == weight)
        return {n for node in found for n in (consumers(node) if self.turned_stacks & {*node.users} else node.users)}

    def operands(self, linear: fx.Node) -> tuple[fx.Node, ...]:
        """Return the nodes whose values a quantized linear is given in the place of a linear's node."""
        return self._linears[linear].operands

    def never_executed(self, outputs: list[Tensor]) -> list[str]:
        """Return linears that none of some runs has reached; an exported graph runs all of them."""
        del outputs
        return []

    @functools.cached_property
    def _linears(self) -> dict[fx.Node, Linear]:
        nodes = (node for segment in self.segments for node in segment.nodes)
        found = ((node, find_linear(node, self.parameters) or find_experts(node, self.parameters)) for node in nodes)
        return {node: linear for node, linear in found if linear is not None}

    @functools.cached_property
    def token_of_row(self) -> dict[fx.Node, fx.Node]:
        """The node that tells where the rows of each expert end → the node that tells which token each row is."""
        found = ((linear.offsets, token_index(linear)) for linear in self._linears.values())
        return {offsets: tokens for offsets, tokens in found if offsets is not None and tokens is not None}

    def gathers_tokens(self, linear: Linear) -> bool:
        """Return whether the input of experts is a gather of tokens, so that a token's row is the same for all."""
        return token_index(linear) is not None

    @functools.cached_property
    def first_readers(self) -> dict[str, Segment]:
        """The first segment that reads each parameter, which stores it."""
        return {name: segment for segment in reversed(self.segments) for name in segment.parameters}

    @functools.cached_property
    def last_use(self) -> dict[fx.Node, fx.Node]:
        """Return for each value the last node that reads it; for the tokens of rows, the last product of experts."""
        found = dict[fx.Node, fx.Node]()
        for node in self.module.graph.nodes:
            linear = self._linears.get(node)
            tokens = self.token_of_row.get(linear.offsets) if linear and linear.offsets else None
            found |= dict.fromkeys([*node.all_input_nodes, *([tokens] if tokens else [])], node)
        return found

    @functools.cached_property
    def last_used_by(self) -> dict[fx.Node, list[fx.Node]]:
        """Return for each node the values that no later node reads."""
        found: dict[fx.Node, list[fx.Node]] = {}
        for source, node in self.last_use.items():
            found.setdefault(node, []).append(source)
        return found


def name_device(module: fx.GraphModule, device: torch.device) -> None:
    """Replace the device that nodes name (`arange(device=meta)`), in nested graphs too."""

    def here(argument: Any) -> Any:
        return device if isinstance(argument, torch.device) else argument

    for graph_module in (m for m in module.modules() if isinstance(m, fx.GraphModule)):
        for node in graph_module.graph.nodes:
            node.args, node.kwargs = map_aggregate(node.args, here), map_aggregate(node.kwargs, here)
        graph_module.recompile()


def is_media(tensor: Tensor) -> bool:
    """Return whether an input is one of images or sound: floats with axes besides those of samples and channels."""
    return tensor.is_floating_point() and tensor.dim() > 2


def rows(lookup: fx.Node) -> int:
    """Return the number of rows of the table that a lookup reads."""
    return int(lookup.args[0].meta["val"].shape[0])  # type: ignore[union-attr]
