"""The parity certificate: what was written is read back and run on two different inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from quantize import gate
from quantize.artifact import PROBE, check_hashes, load, read_linear, read_manifest
from quantize.calibration.runner import Runner
from quantize.checkpoint import index_tensors, read_tensor
from quantize.errors import QuantizeError
from quantize.graph.execute import State
from quantize.graph.program import Program, Segment
from quantize.linear import QuantizedLinear
from quantize.progress import track

LOAD_TOLERANCE = 1e-2  # other machines sum in another order, which can move an activation to the next integer


class Compared:
    """A quantized linear that notes how far it is from the same linear in fake quantization."""

    def __init__(self, module: QuantizedLinear) -> None:
        self.module, self.worst = module, 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        y = self.module(x)
        self.worst = max(self.worst, gate.relative(self.module.fake_quantized(x), y))
        return y  # type: ignore[no-any-return]


def parity(
    program: Program,
    directory: Path,
    settings: Mapping[str, Any],
    ties: Mapping[str, tuple[str, ...]],
    probes: list[Tensor],
    expected: list[Tensor],
    console: Console | None,
) -> dict[str, Any]:
    """Run written files block by block and compare.

    Args:
        program: of the float model.
        directory: the files, complete but for the manifest.
        settings: the artifact's quantization settings.
        ties: names of the same parameter, of which one is stored.
        probes: token ids [1, tokens], different ones.
        expected: the outputs on them while quantizing.
        console: where progress is shown.

    Raises:
        QuantizeError: the files do not give what was quantized.
    """
    runner, files, fake_quant = Runner(program, probes), index_tensors(directory, PROBE), 0.0
    for segment in track(program.segments, "verifying", lambda s: s.name, console):
        state = stored_state(program, segment, files, dict(settings), ties)
        runner.run(segment.nodes, state)
        fake_quant = max([fake_quant, *(linear.worst for linear in state.linears.values())])  # type: ignore[attr-defined]
    reloaded = max(gate.relative(*pair) for pair in zip(runner.outputs(), expected, strict=True))
    if reloaded > gate.TOLERANCE or fake_quant > gate.TOLERANCE * 100:
        raise QuantizeError(
            f"the written files differ from what was quantized by {max(reloaded, fake_quant):.1e}; nothing was kept"
        )
    return {"reloaded": reloaded, "fake_quant": fake_quant, "triton": "not verified", "onnxruntime": "not verified"}


def stored_state(
    program: Program,
    segment: Segment,
    files: dict[str, Path],
    settings: dict[str, Any],
    ties: Mapping[str, tuple[str, ...]],
) -> State:
    """One block as it was written."""
    linears = {linear.node: linear.path for linear in program.linears(segment) if linear.path in settings["modules"]}
    quantized = {f"{path}.weight" for path in linears.values()}
    names = {
        name: next(n for n in (name, *ties.get(name, ())) if n in files)
        for name in segment.parameters
        if name not in quantized
    }
    weights = {name: read_tensor(files[stored], stored).float() for name, stored in names.items()}
    modules = {node: Compared(read_linear(path, settings, files, torch.float32)) for node, path in linears.items()}
    return State(weights, dict(modules))


def verify_artifact(directory: Path) -> dict[str, Any]:
    """Check the hash of every file, load the model, and compare its output on the probes with the recorded one.

    Raises:
        UsageError: no artifact.
        QuantizeError: a file changed, or the model computes something else.
    """
    files = check_hashes(directory)
    probe = load_file(directory / PROBE)
    with torch.no_grad():
        output = first_output(load(directory)(probe["input_ids"]))[:, -1]
    found = gate.relative(output, probe["output"])
    if found > LOAD_TOLERANCE:
        raise QuantizeError(f"{directory} loads, but its output differs from the recorded one by {found:.1e}")
    return {"files": files, "difference": found, "parity": read_manifest(directory)["parity"]}


def first_output(result: Any) -> Tensor:
    """The first tensor that a model returns."""
    return result if isinstance(result, Tensor) else result[0]
