"""The parity check reads the written files back block by block and runs them on two different inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, fx

from quantize.artifact.load import read_linear, read_table
from quantize.artifact.writer import PROBE
from quantize.calibration.runner import SequentialRunner
from quantize.checkpoint.tensor_files import header_tensor, index_tensors, read_float
from quantize.errors import QuantizeError
from quantize.graph.interpreter import Overrides
from quantize.graph.linears import Linear
from quantize.graph.program import Program, Segment
from quantize.nn.filed_experts import FiledExperts
from quantize.nn.kv_cache import quantized_attention, read_kv_cache
from quantize.nn.quantized_embedding import Lookup
from quantize.nn.quantized_experts import QuantizedExperts
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.pipeline.memory import trim_heap
from quantize.pipeline.progress import track
from quantize.pipeline.serialization import lay_out
from quantize.pipeline.tables import module_of
from quantize.transforms import equivalence


class Compared:
    """A quantized linear, or experts, that record the largest difference from the same in fake quantization."""

    def __init__(self, module: QuantizedLinear | QuantizedExperts) -> None:
        self.module, self.worst = module, 0.0

    def unpacked(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        """Unpack the weight within the context, as the module does."""
        return self.module.unpacked(dtype)

    def __call__(self, *operands: Tensor) -> Tensor:
        """Map [..., K] to [..., N]; experts are also given where the rows of each end."""
        y: Tensor = self.module(*operands)
        if self.module.scheme.activations:  # otherwise both are the same product
            self.worst = max(self.worst, equivalence.relative(self.module.fake_quantized(*operands), y))
        return y


def artifact_parity(
    program: Program,
    directory: Path,
    settings: Mapping[str, Any],
    ties: Mapping[str, tuple[str, ...]],
    probes: Sequence[Mapping[str, Tensor]],
    expected: list[Tensor],
    console: Console | None,
) -> dict[str, Any]:
    """Run the written files block by block and compare with the outputs that quantization had.

    Args:
        program: the program of the float model.
        directory: the folder of the files, which are complete except for the manifest.
        settings: the artifact's quantization settings.
        ties: names of the same parameter, one of which is stored.
        probes: two different inputs by name.
        expected: the outputs on them while quantizing.
        console: the console that shows progress.

    Raises:
        QuantizeError: the files give other outputs than the quantized model.
    """
    runner, files, fake_quant = SequentialRunner(program, probes), index_tensors(directory, PROBE), 0.0
    for segment in track(program.segments, "verifying", lambda s: s.name, console):
        state = stored_state(program, segment, files, dict(settings), ties)
        runner.run(segment.nodes, state)
        lay_out(runner)  # as in the run, where it decides in which order a convolution sums
        fake_quant = max([fake_quant, *(linear.worst for linear in state.linears.values())])  # type: ignore[attr-defined]
        del state  # freed before the next is read
        trim_heap()
    reloaded = max(equivalence.relative(*pair) for pair in zip(runner.outputs(), expected, strict=True))
    if reloaded > equivalence.TOLERANCE or fake_quant > equivalence.TOLERANCE * 100:
        raise QuantizeError(
            f"the written files differ from what was quantized by {max(reloaded, fake_quant):.1e}; report this"
        )
    return {"reloaded": reloaded, "fake_quant": fake_quant, "triton": "not verified", "onnxruntime": "not verified"}


def read_product(
    linear: Linear, settings: dict[str, Any], files: dict[str, Path]
) -> QuantizedLinear | QuantizedExperts:
    """Read what the written files hold in the place of a linear; experts are read one by one when they are needed."""
    if linear.experts is None:
        return read_linear(linear.path, settings, files, torch.float32)
    described = read_linear(linear.path, settings, files, torch.float32, header_tensor)
    assert isinstance(described, QuantizedExperts)
    return FiledExperts.of(described, files[f"{linear.path}.qweight"], linear.path)


def stored_state(
    program: Program,
    segment: Segment,
    files: dict[str, Path],
    settings: dict[str, Any],
    ties: Mapping[str, tuple[str, ...]],
) -> Overrides:
    """Read one block from the written files."""
    linears = [linear for linear in program.linears(segment) if linear.path in settings["modules"]]
    replaced = {name for linear in linears for name in (linear.weight, linear.bias)}
    names = {
        name: next((n for n in (name, *ties.get(name, ())) if n in files), "")
        for name in segment.parameters
        if name not in replaced
    }
    held = settings.get("tables", ())
    tables = {name: nodes for name, nodes in program.word_tables.items() if module_of(name) in held}
    device = program.device
    weights = {
        name: read_float(files[stored], stored).to(device) for name, stored in names.items() if name not in tables
    }
    modules: dict[fx.Node, Compared] = {}
    for linear in linears:
        module = read_product(linear, settings, files).to(device)
        modules |= dict.fromkeys(linear.calls, Compared(module))
    operators = dict(quantized_attention(segment, read_kv_cache(settings)))
    for name in (name for name in names if name in tables):
        weights[name], scale = (x.to(device) for x in read_table(module_of(name), files))
        operators |= dict.fromkeys(tables[name], Lookup(scale))
    return Overrides(weights, dict(modules), operators)
