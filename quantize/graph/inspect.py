"""What the analysis of a model finds is given as plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from quantize.checkpoint.opening import open_checkpoint
from quantize.graph.analysis import admissible_bases
from quantize.graph.fallback.program import make_program


def inspect(model: str | Path | nn.Module, trust_remote_code: bool = False) -> dict[str, Any]:
    """Say where transforms are legal in a model, and why they are not elsewhere; no weight is read.

    Args:
        model: a directory, a hub id, or a module whose forward takes token ids [batch, sequence].
        trust_remote_code: whether code of the model's own may run, if transformers has no class for it.

    Returns:
        `export`: whether the model can be exported as a graph, and the exporter's reason if it cannot.
        `bases`: for each basis its `dim`, the transforms `allowed`, its `writers` and `readers`, and what `pins` it.

    Raises:
        UsageError: there is no such model.
        QuantizeError: the model's files are damaged.
    """
    checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code)
    program = make_program(checkpoint, checkpoint.skeleton())
    return {"export": program.export_record(), "bases": [basis.as_dict() for basis in admissible_bases(program)]}
