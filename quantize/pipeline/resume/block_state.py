"""What a run carries across the border between two blocks, as plain data and back."""

from __future__ import annotations

import shutil
from typing import Any

from torch import fx

from quantize.artifact.writer import ArtifactWriter, sha256
from quantize.calibration.runner import SequentialRunner
from quantize.errors import QuantizeError
from quantize.graph.interpreter import Values
from quantize.graph.program import Program
from quantize.pipeline.sequential import SequentialPipeline


def runners(blocks: SequentialPipeline) -> list[tuple[str, SequentialRunner, int]]:
    """All that is on its way through the blocks, and the number of its first batch among those of all ranks."""
    first = blocks.first_batch
    return [
        ("calibration", blocks.calibration, first),
        ("float_reference", blocks.float_reference, first),
        ("probes", blocks.probes, 0),
    ]


def plain_values(values: Values, program: Program) -> dict[str, Any]:
    """Values by the name of their node; None for what the program itself holds."""
    return {node.name: {} if is_held_by_program(node, program) else {"value": value} for node, value in values.items()}


def values_of(plain: dict[str, Any], program: Program) -> Values:
    """What `plain_values` was given."""
    nodes = {node.name: node for node in program.module.graph.nodes}
    return {nodes[name]: kept.get("value", held_value(nodes[name], program)) for name, kept in plain.items()}


def is_held_by_program(node: fx.Node, program: Program) -> bool:
    """Whether the program itself holds a node's value."""
    return node in program.constants or node.op == "get_attr"


def held_value(node: fx.Node, program: Program) -> Any:
    """That value, None if it holds none."""
    if node.op == "get_attr":
        return program.module.get_submodule(str(node.target))
    return program.constants.get(node)


def state_of(blocks: SequentialPipeline) -> dict[str, Any]:
    """What else a run carries across a border."""
    pass_runner = blocks.pass_runner
    sites = [{basis.index: transform for basis, transform in made.items()} for made in pass_runner.sites]
    return {
        "modules": blocks.modules,
        "untied": blocks.ties.untied,
        "tied": blocks.ties.stored,
        "sites": sites,
        "differences": pass_runner.differences,
        "changed": pass_runner.changed,
    }


def restore_state(blocks: SequentialPipeline, state: dict[str, Any]) -> None:
    """The reverse of `state_of`."""
    pass_runner = blocks.pass_runner
    blocks.modules, blocks.ties.untied, blocks.ties.stored = state["modules"], state["untied"], state["tied"]
    pass_runner.differences, pass_runner.changed = state["differences"], state["changed"]
    for step, made, sites in zip(pass_runner.steps, state["sites"], pass_runner.sites, strict=True):
        bases = {basis.index: basis for basis in step.sites}
        sites.update({bases[index]: transform for index, transform in made.items()})


def restore_files(writer: ArtifactWriter, weight_map: dict[str, str], hashes: dict[str, str]) -> None:
    """Take over the files that were recorded, unchanged, and remove all others."""
    for path in [path for path in writer.directory.iterdir() if path.name not in hashes]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, digest in hashes.items():
        if not (writer.directory / name).is_file() or sha256(writer.directory / name) != digest:
            raise QuantizeError(
                f"{writer.directory / name} is not as it was written; remove {writer.directory.parent} to start again"
            )
    writer.weight_map, writer.hashes = weight_map, hashes
