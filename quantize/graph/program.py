"""A model as its exported graph, cut into blocks, with the name of every parameter it reads and no weight in memory."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from quantize.errors import ExportError, reason
from quantize.graph.inputs import example_inputs
from quantize.graph.linears import ATEN, NOT_ALONE, READ_ITSELF, VIEWS, Linear, find_linear, irreplaceable, stacks
from quantize.graph.standin import read_past_forward

MOVES = {ATEN.transpose.int, ATEN.slice.Tensor, ATEN.clone.default}


@dataclass(frozen=True)
class Segment:
    """A run of nodes that belongs to one repeated block, or to what stands before, between and after.

    Attributes:
        name: module path of the block (`model.layers.3`), or of what stands around it.
        nodes: in execution order.
        parameters: names of the parameters the nodes read, in that order.
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
        handed_on: outputs that are no result: an encoder's states beside a decoder's output, which the decoder reads.
        read: names of weights that the model reads itself beside their product.
        refused: why the exporter refused the model, whose graph then holds its linears alone; empty otherwise.
    """

    module: fx.GraphModule
    parameters: dict[fx.Node, str]
    buffers: dict[fx.Node, Tensor]
    constants: dict[fx.Node, Any]
    inputs: dict[str, fx.Node]
    segments: tuple[Segment, ...]
    output: fx.Node
    handed_on: frozenset[fx.Node] = frozenset()
    read: frozenset[str] = frozenset()
    refused: str = ""

    @property
    def refusal(self) -> str:
        """What it means that the model cannot be exported, as a line to show."""
        return f"the model cannot be exported ({self.refused}): only online transforms are used"

    def export_record(self) -> dict[str, object]:
        """Plain data for JSON: whether the model could be exported, and why not."""
        return {"exported": not self.refused, "reason": self.refused}

    @property
    def vocabulary(self) -> int:
        """Rows of the smallest table that the inputs index; token ids lie below it."""
        ids, tables = set(self.inputs.values()), list[Any]()
        for node in self.module.graph.nodes:
            if node.target in VIEWS | MOVES and node.args[0] in ids:
                ids.add(node)
            if node.target is ATEN.embedding.default and node.args[1] in ids:
                tables.append(node.args[0])
        return min([int(table.meta["val"].shape[0]) for table in tables] or [2**31])

    def linears(self, segment: Segment) -> list[Linear]:
        """The linears of a segment that a quantized one can stand in for, in order."""
        found = (self._linears[node] for node in segment.nodes if node in self._linears)
        return [linear for linear in found if linear.weight not in self.irreplaceable]

    @functools.cached_property
    def irreplaceable(self) -> dict[str, str]:
        """The weights of all other linears, and stacks of them, and why."""
        more = irreplaceable(self.module.graph, self._linears.values(), self.parameters)
        return dict.fromkeys(self.read, READ_ITSELF) | dict.fromkeys(more, NOT_ALONE) | stacks(self.parameters)

    def idle(self, outputs: list[Tensor]) -> list[str]:
        """Linears that none of some runs has reached; an exported graph runs all."""
        del outputs
        return []

    @functools.cached_property
    def _linears(self) -> dict[fx.Node, Linear]:
        found = ((node, find_linear(node, self.parameters)) for segment in self.segments for node in segment.nodes)
        return {node: linear for node, linear in found if linear is not None}

    @functools.cached_property
    def last_use(self) -> dict[fx.Node, fx.Node]:
        """For each value the last node that reads it."""
        return {source: node for node in self.module.graph.nodes for source in node.all_input_nodes}


def export_program(skeleton: nn.Module) -> Program:
    """Export one forward pass; sizes of batch and sequence are dynamic.

    Args:
        skeleton: parameters on the meta device, buffers real; its parameters are untied in place.

    Raises:
        ExportError: the exporter refuses the model; the message carries its reason.
    """
    buffers = dict(skeleton.named_buffers())
    untie(skeleton)
    skeleton.eval().to("meta")
    switches = forward_switches(skeleton)
    try:
        inputs = example_inputs(skeleton)
        example = {name: found.example for name, found in inputs.items()} | switches
        dynamic = {name: dict.fromkeys(found.dynamic, torch.export.Dim.DYNAMIC) for name, found in inputs.items()}
        shapes = {**dynamic, **dict.fromkeys(switches)}
        with quiet():
            exported = torch.export.export(skeleton, (), example, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # whatever the exporter meets in a stranger's code
        raise ExportError(reason(error)) from error
    program = from_exported(exported, buffers, switches, tuple(inputs))
    linears = [linear for segment in program.segments for linear in program.linears(segment)]
    with quiet():
        return replace(program, read=read_past_forward(skeleton, linears, example))


def forward_switches(model: nn.Module) -> dict[str, bool]:
    """`use_cache=False` where forward takes that switch: one pass over whole sequences needs no cache."""
    known = hasattr(getattr(model, "config", None), "use_cache")
    return {"use_cache": False} if known and "use_cache" in inspect.signature(model.forward).parameters else {}


def untie(model: nn.Module) -> None:
    """Give every parameter name a tensor of its own, so that the graph tells the uses of a tied parameter apart."""
    for path, parameter in list(model.named_parameters(remove_duplicate=False)):
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(parameter.detach().to("meta"), requires_grad=False))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Others warn of deprecations and masks, and the exporter prints half a graph where it fails: nothing to act on."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable()
        try:
            yield
        finally:
            logging.disable(before)


def from_exported(
    exported: torch.export.ExportedProgram,
    buffers: dict[str, Tensor],
    switches: dict[str, bool],
    names: tuple[str, ...],
) -> Program:
    """Read a `Program` off an exported graph; nodes that the exporter placed on meta are moved to the CPU."""
    module, signature = exported.graph_module, exported.graph_signature
    drop_assertions(module)
    move_to_cpu(module)
    count_in_floats(module)
    by_name = {n.name: n for n in module.graph.nodes if n.op == "placeholder"}
    parameters = {by_name[p]: name for p, name in signature.inputs_to_parameters.items()}
    values = {by_name[p]: buffers[name] for p, name in signature.inputs_to_buffers.items()}
    values |= {by_name[p]: exported.constants[name] for p, name in signature.inputs_to_lifted_tensor_constants.items()}
    constants = {by_name[name]: value for name, value in switches.items() if name in by_name}
    output = next(n for n in module.graph.nodes if n.op == "output")
    inputs = {name: by_name[name] for name in names}
    handed_on = frozenset(node for name, node in named_outputs(exported, output) if name.startswith("encoder_"))
    return Program(module, parameters, values, constants, inputs, cut(module, parameters), output, handed_on)


def named_outputs(exported: torch.export.ExportedProgram, output: fx.Node) -> list[tuple[str, fx.Node]]:
    """What the graph returns, each with its key where the model returns a dictionary."""
    spec, nodes = exported.call_spec.out_spec, output.all_input_nodes
    keys = spec.context if isinstance(getattr(spec, "context", None), list) else []
    names = [str(key) for key in keys] if len(keys) == len(nodes) else [""] * len(nodes)
    return list(zip(names, nodes, strict=True))


def drop_assertions(module: fx.GraphModule) -> None:
    """Remove what the exporter asserts of example tensors (their device is meta) and what only that needed."""
    for graph_module in (m for m in module.modules() if isinstance(m, fx.GraphModule)):
        for node in reversed(graph_module.graph.nodes):
            if "_assert" in str(node.target) and not node.users:
                graph_module.graph.erase_node(node)
        graph_module.graph.eliminate_dead_code()


def move_to_cpu(module: fx.GraphModule) -> None:
    """Replace the device that nodes name (`arange(device=meta)`), in nested graphs too."""

    def on_cpu(argument: Any) -> Any:
        return torch.device("cpu") if isinstance(argument, torch.device) else argument

    for graph_module in (m for m in module.modules() if isinstance(m, fx.GraphModule)):
        for node in graph_module.graph.nodes:
            node.args, node.kwargs = map_aggregate(node.args, on_cpu), map_aggregate(node.kwargs, on_cpu)
        graph_module.recompile()


def count_in_floats(module: fx.GraphModule) -> None:
    """Let histograms count floats: the CPU has none of integers, which other devices choose."""
    for node in (n for n in module.graph.nodes if n.target is torch.ops.aten.histc.default):
        with module.graph.inserting_before(node):
            cast = module.graph.call_function(torch.ops.aten.to.dtype, (node.args[0], torch.float32))
        cast.meta.update(node.args[0].meta)
        node.args = (cast, *node.args[1:])


def cut(module: fx.GraphModule, parameters: dict[fx.Node, str]) -> tuple[Segment, ...]:
    """Cut the graph where it enters or leaves an item of the outermost list of modules."""
    runs: list[tuple[str, list[fx.Node]]] = []
    for node in module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        block = block_of(node)
        if not runs or (block is not None and block != runs[-1][0]):
            runs.append((block or "", []))
        runs[-1][1].append(node)
    return tuple(Segment(name, tuple(nodes), read_by(nodes, parameters)) for name, nodes in split_tail(runs))


def block_of(node: fx.Node) -> str | None:
    """Path of the outermost list item that the node's module lies in; '' outside of all, None if not known."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    return block_at(next(reversed(stack.values()))[0])


def block_at(path: str) -> str:
    """Path of the outermost list item that a module lies in; '' outside of all."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", path)
    return found.group() if found else ""


def split_tail(runs: list[tuple[str, list[fx.Node]]]) -> list[tuple[str, list[fx.Node]]]:
    """Name the runs outside of blocks by their place."""
    return [
        (name or ("head" if i == 0 else "tail" if i == len(runs) - 1 else f"between {i}"), nodes)
        for i, (name, nodes) in enumerate(runs)
    ]


def read_by(nodes: list[fx.Node], parameters: dict[fx.Node, str]) -> tuple[str, ...]:
    """Names of the parameters that some nodes read, in order, once each."""
    return tuple(dict.fromkeys(parameters[n] for node in nodes for n in node.all_input_nodes if n in parameters))
