"""The state that a run carries across the border between two blocks becomes plain data, and is restored from it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from typing import Any, Protocol

from torch import fx

from quantize.artifact.writer import ArtifactWriter
from quantize.calibration.runner import SequentialRunner
from quantize.checkpoint.files_seen import sha256
from quantize.errors import QuantizeError
from quantize.graph.interpreter import Values
from quantize.graph.program import Program, Segment


class Resumable(Protocol):
    """The state of a run that a journal stores and restores (`SequentialPipeline`)."""

    program: Program

    def runners(self) -> Iterable[tuple[str, SequentialRunner, int]]:
        """Yield each runner with its name and the number of its first batch among those of all ranks."""

    def calibrates_after(self, segment: Segment) -> bool:
        """Return whether anything after a block uses the calibration activations."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything else that is carried from block to block."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""


def plain_values(values: Values, program: Program) -> dict[str, Any]:
    """Return values by the name of their node; an entry is empty if the program itself holds the value."""
    return {node.name: {} if is_held_by_program(node, program) else {"value": value} for node, value in values.items()}


def values_of(plain: dict[str, Any], program: Program) -> Values:
    """Return the values that `plain_values` was given."""
    nodes = {node.name: node for node in program.module.graph.nodes}
    return {nodes[name]: kept.get("value", held_value(nodes[name], program)) for name, kept in plain.items()}


def is_held_by_program(node: fx.Node, program: Program) -> bool:
    """Return whether the program itself holds a node's value."""
    return node in program.constants or node.op == "get_attr"


def held_value(node: fx.Node, program: Program) -> Any:
    """Return the value of a node that the program holds, or None if it holds none."""
    if node.op == "get_attr":
        return program.module.get_submodule(str(node.target))
    return program.constants.get(node)


def restore_files(writer: ArtifactWriter, weight_map: dict[str, str], hashes: dict[str, str]) -> None:
    """Check that the recorded files are unchanged, and remove all others."""
    for path in [path for path in writer.directory.iterdir() if path.name not in hashes]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, digest in hashes.items():
        if not (writer.directory / name).is_file() or sha256(writer.directory / name) != digest:
            raise QuantizeError(
                f"{writer.directory / name} is not as it was written; remove {writer.directory.parent} to start again"
            )
    writer.weight_map, writer.hashes = weight_map, hashes
