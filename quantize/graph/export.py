"""The exporter gives one forward pass, which is cut into blocks and becomes a `Program`."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._dynamo.exc import UserError, UserErrorType

from quantize.checkpoint.meta_model import ties_of
from quantize.errors import ExportError
from quantize.graph.expert_products import write_as_stacks
from quantize.graph.inputs import Input, example_inputs
from quantize.graph.linears import find_linear
from quantize.graph.products import write_as_linears
from quantize.graph.program import Program, Segment, name_device
from quantize.graph.refusal import refusal
from quantize.graph.regions import inline_regions
from quantize.graph.usage_probe import asked_for_more, looks_up

# outputs that are read by other parts of a model, or hold what others have read
INTERMEDIATE = ("encoder_", "image_hidden_states", "image_outputs", "video_outputs", "audio_outputs")


def export_program(skeleton: nn.Module, inputs: Mapping[str, Input] | None = None) -> Program:
    """Export one forward pass with dynamic sizes of batch and sequence.

    Args:
        skeleton: the model with parameters on the meta device and real buffers; its parameters are untied in place.
        inputs: what `forward` is given; None for what the model takes by itself.

    Raises:
        ExportError: the exporter refuses the model; the message carries its reason.
    """
    buffers, ties = dict(skeleton.named_buffers()), untie(skeleton)
    turn_caches_off(skeleton)
    skeleton.eval().to("meta")
    switches = forward_switches(skeleton)
    try:
        inputs = example_inputs(skeleton) if inputs is None else inputs
        with quiet(), plain_encoder_layers():
            exported, batch = export_batches(skeleton, inputs, switches)
    except Exception as error:  # the exporter may meet anything in code of other authors
        raise ExportError(refusal(error)) from error
    use_first_paths(exported, skeleton)
    program = replace(from_exported(exported, buffers, switches, tuple(inputs)), batch=batch)
    example = {name: found.example for name, found in inputs.items()} | switches
    linears = [linear for linear in program.all_linears if linear.experts is None]
    embeddings = {f"{path}.weight" for path, module in skeleton.named_modules() if looks_up(module)}
    with quiet():
        asked = asked_for_more(skeleton, linears, example)
    more = inspect.signature(skeleton.forward).parameters.keys() - example.keys()
    unreached = unread(program.parameters, ties) if more else frozenset[str]()
    return replace(program, asked_for_more=asked, embeddings=frozenset(embeddings), ties=ties, unreached=unreached)


def export_batches(
    skeleton: nn.Module, inputs: Mapping[str, Input], switches: Mapping[str, bool]
) -> tuple[torch.export.ExportedProgram, int | None]:
    """Export a batch of any size, or of one sample where the exporter fixes the size, with that size (None for any)."""
    try:
        return export_inputs(skeleton, inputs, switches), None
    except UserError as error:  # `forward` counts the samples in Python
        if error.error_type is not UserErrorType.CONSTRAINT_VIOLATION:
            raise
        single = {
            name: replace(found, example=found.example[:1], dynamic=tuple(n for n in found.dynamic if n))
            for name, found in inputs.items()
        }
        return export_inputs(skeleton, single, switches), 1


def export_inputs(
    skeleton: nn.Module, inputs: Mapping[str, Input], switches: Mapping[str, bool]
) -> torch.export.ExportedProgram:
    """Export one forward pass on the meta device."""
    example: dict[str, Any] = {name: found.example for name, found in inputs.items()}
    example |= switches
    dynamic = {name: dict.fromkeys(found.dynamic, torch.export.Dim.DYNAMIC) for name, found in inputs.items()}
    shapes = {**dynamic, **dict.fromkeys(switches)}
    exported = without_vmap(torch.export.export(skeleton, (), example, dynamic_shapes=shapes, strict=False))
    lifted = exported.graph_signature.inputs_to_lifted_tensor_constants.values()
    if any(exported.constants[name].is_meta for name in lifted):
        # a tensor of numbers that `forward` makes keeps them on the CPU alone, where no page is ever touched
        skeleton.to_empty(device="cpu")
        on_cpu = {k: torch.zeros_like(x, device="cpu") if isinstance(x, Tensor) else x for k, x in example.items()}
        exported = without_vmap(torch.export.export(skeleton, (), on_cpu, dynamic_shapes=shapes, strict=False))
        skeleton.to("meta")
    return exported


def without_vmap(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Write `torch.vmap` in a graph as operators on whole tensors: its own nodes run together or not at all."""
    nodes = exported.graph.nodes
    if not any(getattr(node.target, "__module__", "") == torch._functorch.predispatch.__name__ for node in nodes):
        return exported
    plain: torch.export.ExportedProgram = exported.run_decompositions({})
    return plain


def unread(parameters: Mapping[fx.Node, str], ties: Mapping[str, Sequence[str]]) -> frozenset[str]:
    """Return the names of the parameters that the graph reads under no name."""
    read = {name for node, name in parameters.items() if node.users}
    return frozenset(name for name in parameters.values() if not read & {name, *ties.get(name, ())})


def forward_switches(model: nn.Module) -> dict[str, bool]:
    """Return `use_cache=False` if `forward` takes that switch, because a pass over whole sequences needs no cache."""
    known = hasattr(getattr(model, "config", None), "use_cache")
    return {"use_cache": False} if known and "use_cache" in inspect.signature(model.forward).parameters else {}


def turn_caches_off(model: nn.Module) -> None:
    """Tell every model inside of a model to return no cache, since the one around them may have no such switch."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False


def untie(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Give every parameter name a tensor of its own, so that the graph tells the uses of a tied parameter apart.

    Returns:
        Parameter → all names that were tied; a module that stands in several places counts once, by its first path.
    """
    ties = ties_of(model)
    for path, parameter in list(model.named_parameters(remove_duplicate=False)):
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(parameter.detach().to("meta"), requires_grad=False))
    own = dict(model.named_parameters())
    return {name: tuple(other for other in names if other in own) for name, names in ties.items() if name in own}


@contextlib.contextmanager
def plain_encoder_layers() -> Iterator[None]:
    """Let `nn.TransformerEncoder` call its modules, in place of one operator that is all of a layer."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence other libraries' warnings, and the graph that a failing exporter prints, since nobody can act on them."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable()
        try:
            yield
        finally:
            logging.disable(before)


def use_first_paths(exported: torch.export.ExportedProgram, model: nn.Module) -> None:
    """Name a module that stands in several places, and its parameters and buffers, by the first place alone."""
    first: dict[nn.Module, str] = {}
    paths = {path: first.setdefault(module, path) for path, module in model.named_modules(remove_duplicate=False)}
    for spec in (spec for spec in exported.graph_signature.input_specs if spec.target is not None):
        path, _, leaf = spec.target.rpartition(".")
        spec.target = f"{paths[path]}.{leaf}" if paths.get(path) else spec.target
    for graph_module in (m for m in exported.graph_module.modules() if isinstance(m, fx.GraphModule)):
        for node in graph_module.graph.nodes:
            stack = node.meta.get("nn_module_stack") or {}
            node.meta["nn_module_stack"] = {k: (paths.get(path, path), kind) for k, (path, kind) in stack.items()}


def from_exported(
    exported: torch.export.ExportedProgram,
    buffers: dict[str, Tensor],
    switches: dict[str, bool],
    names: tuple[str, ...],
) -> Program:
    """Read a `Program` off an exported graph; nodes that the exporter placed on meta are moved to the CPU."""
    module, signature = exported.graph_module, exported.graph_signature
    inline_regions(module)
    drop_assertions(module)
    name_device(module, torch.device("cpu"))
    count_in_floats(module)
    write_as_linears(module, {n for n in module.graph.nodes if n.name in signature.inputs_to_parameters})
    write_as_stacks(module, [n for n in module.graph.nodes if n.name in signature.inputs_to_parameters])
    by_name = {n.name: n for n in module.graph.nodes if n.op == "placeholder"}
    parameters = {by_name[p]: name for p, name in signature.inputs_to_parameters.items()}
    read = {name for node, name in parameters.items() if node.users}
    parameters = {node: name for node, name in parameters.items() if node.users or name not in read}
    values = {by_name[p]: buffers[name] for p, name in signature.inputs_to_buffers.items()}
    values |= {by_name[p]: exported.constants[name] for p, name in signature.inputs_to_lifted_tensor_constants.items()}
    constants = {by_name[name]: value for name, value in switches.items() if name in by_name}
    output = next(n for n in module.graph.nodes if n.op == "output")
    inputs = {name: by_name[name] for name in names}
    intermediate_outputs = frozenset(
        node for name, node in named_outputs(exported, output) if name.startswith(INTERMEDIATE)
    )
    return Program(module, parameters, values, constants, inputs, cut(module, parameters), output, intermediate_outputs)


def named_outputs(exported: torch.export.ExportedProgram, output: fx.Node) -> list[tuple[str, fx.Node]]:
    """Return the graph's outputs, each with its key if the model returns a dictionary."""
    spec, flat = exported.call_spec.out_spec, pytree.arg_tree_leaves(output.args[0])
    keys = spec.context if isinstance(getattr(spec, "context", None), list) else []
    names = [str(key) for key, child in zip(keys, spec.children(), strict=False) for _ in range(child.num_leaves)]
    names = names if len(names) == len(flat) else [""] * len(flat)
    found = {node: name for name, node in zip(names, flat, strict=True) if isinstance(node, fx.Node)}
    return [(found[node], node) for node in output.all_input_nodes]


def drop_assertions(module: fx.GraphModule) -> None:
    """Remove what the exporter asserts of example tensors (their device is meta) and what only that needed."""
    for graph_module in (m for m in module.modules() if isinstance(m, fx.GraphModule)):
        for node in reversed(graph_module.graph.nodes):
            if "_assert" in str(node.target) and not node.users:
                graph_module.graph.erase_node(node)
        graph_module.graph.eliminate_dead_code()


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
    runs = with_all_calls(runs, parameters)
    return tuple(Segment(name, tuple(nodes), read_by(nodes, parameters)) for name, nodes in split_tail(runs))


def with_all_calls(
    runs: list[tuple[str, list[fx.Node]]], parameters: dict[fx.Node, str]
) -> list[tuple[str, list[fx.Node]]]:
    """Join the runs from the first call of a linear to its last, as its weight is rounded once, for all its calls."""
    first: dict[str, int] = {}
    joined: list[tuple[str, list[fx.Node]]] = []
    starts: list[int] = []  # the number of the first run in each of those joined so far
    for number, (name, nodes) in enumerate(runs):
        weights = [found.weight for node in nodes if (found := find_linear(node, parameters))]
        start = min([first.setdefault(weight, number) for weight in weights], default=number)
        joined.append((name, list(nodes)))
        starts.append(number)
        while starts[-1] > start:
            starts.pop()
            joined[-2][1].extend(joined.pop()[1])
    return joined


def block_of(node: fx.Node) -> str | None:
    """Return the path of the outermost list item that the node's module lies in; '' outside of all, None if unknown."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    return block_at(next(reversed(stack.values()))[0])


def block_at(path: str) -> str:
    """Return the path of the outermost list item that a module lies in; '' outside of all."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", path)
    return found.group() if found else ""


def split_tail(runs: list[tuple[str, list[fx.Node]]]) -> list[tuple[str, list[fx.Node]]]:
    """Name the runs outside of blocks by their place."""
    return [
        (name or ("head" if i == 0 else "tail" if i == len(runs) - 1 else f"between {i}"), nodes)
        for i, (name, nodes) in enumerate(runs)
    ]


def read_by(nodes: list[fx.Node], parameters: dict[fx.Node, str]) -> tuple[str, ...]:
    """Return the names of the parameters that some nodes read, in order, each once."""
    return tuple(dict.fromkeys(parameters[n] for node in nodes for n in node.all_input_nodes if n in parameters))
