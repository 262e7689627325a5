"""A model that the exporter refuses becomes a program of its linears, on the inputs that the float model gives them.

The graph shows no weight that writes those inputs, so the analysis pins them all and only online transforms are legal.
The float model runs as a whole, so each linear is rounded on inputs in which no earlier linear is rounded yet.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantize.checkpoint.checkpoint import Checkpoint
from quantize.errors import ExportError, log_own_words
from quantize.graph import export
from quantize.graph.experts import grouped_mm
from quantize.graph.fallback.float_model import FloatModel, linear_inputs, plain_linears
from quantize.graph.fallback.probe import bounds, idle_without, vocabulary, weights_read
from quantize.graph.inputs import BATCH, Input, example_inputs
from quantize.graph.linears import LINEAR, READ_ITSELF
from quantize.graph.other_sizes import check_length
from quantize.graph.program import Program, Segment, is_media

KEPT_ROWS = 32  # rows of each linear's output to compare; all rows of all linears would not fit into memory
Modules = dict[str, nn.Linear | bool]  # linears by path, and stacks by name with whether they are [experts, K, N]


@dataclass(frozen=True, kw_only=True)
class LinearsOnlyProgram(Program):
    """A program of linears and experts alone.

    Attributes:
        model: the float model that gives the linears their inputs.
        paths: the paths of all linears, in the order of the outputs.
    """

    model: FloatModel
    paths: tuple[str, ...]

    @functools.cached_property
    def vocabulary(self) -> int:
        """The size of the vocabulary, which token ids lie below."""
        return vocabulary(self.model)

    @functools.cached_property
    def bounds(self) -> dict[str, int]:
        """Input → the rows of the smallest table that it indexes, for inputs that index one."""
        return bounds(self.model)

    @functools.cached_property
    def towers(self) -> frozenset[str]:
        """The paths of linears that run on images or sound alone, if token ids are the main input."""
        media = [name for name, x in self.model.examples.items() if is_media(x)]
        return frozenset(idle_without(self.model, media)) if next(iter(self.inputs)) not in media else frozenset()

    @functools.cached_property
    def not_replaceable(self) -> dict[str, str]:
        """The weights of linears that no other module can stand in for, and why."""
        return {f"{path}.weight": READ_ITSELF for path in weights_read(self.model)}

    def never_executed(self, outputs: list[Tensor]) -> list[str]:
        """Return linears without a row in any of the outputs, which are those of one run after the other."""
        return [path for i, path in enumerate(self.paths) if not any(map(len, outputs[i :: len(self.paths)]))]


def make_program(
    checkpoint: Checkpoint,
    skeleton: nn.Module,
    length: int | None = None,
    inputs: Mapping[str, Input] | None = None,
) -> Program:
    """Return the exported graph of a model, or its linears alone if the exporter refuses it.

    Args:
        checkpoint: the model.
        skeleton: what `checkpoint.skeleton()` returned; it is changed in place.
        length: the number of tokens that the graph must hold for; None for any.
        inputs: what `forward` is given; None for what the model takes by itself.

    Raises:
        ExportError: the exporter refuses the model, and it has no linear.
    """
    try:
        inputs = example_inputs(skeleton) if inputs is None else inputs
        program = export.export_program(skeleton, inputs)
        if length is not None:
            check_length(program, inputs, length)
        return program
    except ExportError as refusal:
        log_own_words(refusal)
        program = unexported_program(checkpoint, refusal.reason, inputs)
        if not program.segments:
            raise
        return program


def unexported_program(
    checkpoint: Checkpoint, export_error: str, inputs: Mapping[str, Input] | None = None
) -> LinearsOnlyProgram:
    """Return a graph of a model's linears, block by block, each on what `linear_inputs` returns.

    Args:
        checkpoint: the model.
        export_error: why the model cannot be exported.
        inputs: as in `make_program`.
    """
    skeleton = checkpoint.skeleton()
    ties = export.untie(skeleton)
    inputs = example_inputs(skeleton) if inputs is None else inputs
    examples = {k: found.example if found.sample is None else found.sample for k, found in inputs.items()}
    model = FloatModel(checkpoint, examples, export.forward_switches(skeleton))
    graph, linears = fx.Graph(), in_order(skeleton, model.stacks)
    source = graph.placeholder("model")
    places = {name: graph.placeholder(f"input_{name}") for name in examples}
    weights = {name: parameter_node(graph, p) for name, p in skeleton.named_parameters()}
    runs = [(name, add_block(graph, source, places, weights, run)) for name, run in blocks_of(linears)]
    output = graph.output(tuple(node for _, nodes in runs for node in nodes if not node.users))
    return LinearsOnlyProgram(
        module=fx.GraphModule(nn.Module(), graph),
        parameters={node: name for name, node in weights.items()},
        buffers={},
        constants={source: model},
        inputs=places,
        segments=tuple(segment(name, nodes, weights) for name, nodes in export.split_tail(runs)),
        output=output,
        export_error=export_error,
        embeddings=frozenset(f"{path}.weight" for path, m in skeleton.named_modules() if isinstance(m, nn.Embedding)),
        ties=ties,
        model=model,
        paths=tuple(linears),
    )


def segment(name: str, nodes: list[fx.Node], weights: dict[str, fx.Node]) -> Segment:
    """Return a segment of some nodes, with the parameters that they read."""
    return Segment(name, tuple(nodes), export.read_by(nodes, {node: name for name, node in weights.items()}))


def in_order(skeleton: nn.Module, stacks: Mapping[str, bool]) -> Modules:
    """Return the linears of a model and its stacks of experts, in the order in which modules are registered."""
    linears, found = plain_linears(skeleton), Modules()
    for path, module in skeleton.named_modules():
        found |= {path: linears[path]} if path in linears else {}
        names = (f"{path}.{leaf}".lstrip(".") for leaf, _ in module.named_parameters(recurse=False))
        found |= {name: stacks[name] for name in names if name in stacks}
    return found


def blocks_of(linears: Modules) -> list[tuple[str, Modules]]:
    """Return the linears by the block in which they lie."""
    runs = itertools.groupby(linears.items(), lambda item: export.block_at(item[0]))
    return [(name, dict(run)) for name, run in runs]


def parameter_node(graph: fx.Graph, parameter: nn.Parameter) -> fx.Node:
    """Add the placeholder of a parameter, with the parameter's shape."""
    node = graph.placeholder(f"parameter_{len(graph.nodes)}")
    node.meta["val"] = parameter
    return node


def add_block(
    graph: fx.Graph, source: fx.Node, inputs: dict[str, fx.Node], weights: dict[str, fx.Node], linears: Modules
) -> list[fx.Node]:
    """Add the nodes of one block: all inputs in one run of the model, then each linear and its output's last rows."""
    given = graph.call_function(linear_inputs, (source, tuple(linears)), dict(inputs))
    given.meta["nn_module_stack"] = {"": ("what could not be exported", nn.Module)}
    nodes, numbers = [given], itertools.count()

    def taken(number: int, *shape: int) -> fx.Node:
        return shaped(graph, operator.getitem, (given, number), *shape)

    for path, linear in linears.items():
        if isinstance(linear, nn.Linear):
            operands = [weights[name] for name in (f"{path}.weight", f"{path}.bias") if name in weights]
            x, N = taken(next(numbers), BATCH, linear.in_features), linear.out_features
            products = [x, shaped(graph, LINEAR, (x, *operands), BATCH, N)]
        else:
            E, *sizes = weights[path].meta["val"].shape
            K, N = sizes if linear else reversed(sizes)
            x, ends = taken(next(numbers), BATCH, K), taken(next(numbers), E)
            W = [] if linear else [shaped(graph, torch.ops.aten.transpose.int, (weights[path], 1, 2), E, K, N)]
            products = [x, ends, *W, shaped(graph, grouped_mm, (x, (W or [weights[path]])[0], ends), BATCH, N)]
        last = shaped(graph, torch.ops.aten.slice.Tensor, (products[-1], 0, -KEPT_ROWS), BATCH, N)
        nodes += [*products, last, shaped(graph, torch.ops.aten.clone.default, (last,), BATCH, N)]
    return nodes


def shaped(graph: fx.Graph, target: Callable[..., Any], args: tuple[Any, ...], *shape: int) -> fx.Node:
    """Give a node a value of a shape."""
    node = graph.call_function(target, args)
    node.meta["val"] = torch.empty(*shape, device="meta")
    return node
