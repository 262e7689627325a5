"""What a run carries across the border between two blocks, as plain data and back."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from typing import Any, Protocol

from torch import fx

from quantize.artifact.writer import ArtifactWriter, sha256
from quantize.calibration.runner import SequentialRunner
from quantize.errors import QuantizeError
from quantize.graph.interpreter import Values
from quantize.graph.program import Program, Segment


class Resumable(Protocol):
    """What a journal stores and restores: a run on its way through the blocks (`SequentialPipeline`)."""

    program: Program

    def runners(self) -> Iterable[tuple[str, SequentialRunner, int]]:
        """All that is on its way, by name, and the number of its first batch among those of all ranks."""

    def calibrates_after(self, segment: Segment) -> bool:
        """Whether anything behind a block looks at the calibration activations."""

    def state_dict(self) -> dict[str, Any]:
        """All else that is carried from block to block."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""


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
