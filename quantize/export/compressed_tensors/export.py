"""An artifact is exported as a compressed-tensors checkpoint, which transformers and vLLM load.

The package of that name is not needed to write a checkpoint; if it is installed, the checkpoint is loaded and compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import Tensor, nn

from quantize.artifact.load import load
from quantize.artifact.writer import ArtifactWriter, as_json
from quantize.errors import UsageError
from quantize.export.comparison import (
    as_float,
    copy_with_replaced_linears,
    first_outputs,
    relative_error,
    round_tables,
    with_float_activations,
)  # fmt: skip
from quantize.export.compressed_tensors.activation_ranges import input_divisors
from quantize.export.compressed_tensors.format import (
    has_packed_zero_points,
    held_schemes,
    is_packed,
    quantization_config,
    storage,
    stored,
)
from quantize.export.hf_checkpoint import check_difference, outputs_of, probe_inputs, shards
from quantize.export.outline import Outline
from quantize.formats import get_format
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.scheme.scheme import TABLE_SCHEME, Scheme


def export_compressed_tensors(
    directory: Path, writer: ArtifactWriter, console: Console | None = None, calibration: Path | None = None
) -> dict[str, Any]:
    """Write the safetensors shards, their index and `config.json`, one shard in memory at a time; then compare.

    Args:
        directory: an artifact in which `obstacles` finds nothing.
        writer: an open writer; the caller writes the side files.
        console: the console that shows progress; None shows nothing.
        calibration: data for NVFP4, as for quantizing; None takes the bundled prose.

    Returns:
        The entry `parity`: what `compressed_tensors_parity` measured, or `{"transformers": "not verified"}` if the
            package
        is not installed.

    Raises:
        UsageError: calibration data are given but not needed, or the model does not take them.
        QuantizeError: a file is damaged, or transformers computes something else.
    """
    outline = Outline.read(directory)
    schemes = held_schemes(outline)
    scaled = {path for path, scheme in schemes.items() if get_format(scheme.weights.format).has_global_scale}
    if not scaled and calibration is not None:
        raise UsageError("only NVFP4 checkpoints hold ranges of activations; leave --calibration out")
    divisors = input_divisors(directory, calibration) if scaled else {}

    def compressed(path: str, linear: QuantizedLinear) -> dict[str, Tensor]:
        bias = {} if linear.bias is None else {"bias": linear.bias}
        if path not in schemes:
            return {"weight": linear.qtensor().dequantize().to(linear.scale.dtype)} | bias
        divisor = {"input_global_scale": divisors[path]} if path in scaled else {}
        return stored(linear.qtensor(), is_packed(linear.scheme)) | bias | divisor

    for shard, tensors in shards(directory, outline, compressed, console):
        writer.add(shard, tensors)
    writer.write_index()
    own = {"dtype": "bfloat16"} if running_type(schemes) == torch.bfloat16 else {}
    entry = quantization_config(schemes, ignored(outline.skeleton, schemes))
    writer.write("config.json", as_json({**outline.config, **own, "quantization_config": entry}))
    if console is not None:
        console.print(f"to serve it: {serve_command(writer.output, schemes)}", soft_wrap=True, markup=False)
    if find_spec("compressed_tensors") is None:
        return {"parity": {"transformers": "not verified"}}
    return {"parity": compressed_tensors_parity(directory, writer.directory, schemes, outline.dtype)}


def serve_command(output: Path, schemes: Mapping[str, Scheme]) -> str:
    """Return the command with which vLLM serves a checkpoint; without its flag vLLM leaves activations in floats."""
    integer = any(scheme.activations is not None and storage(scheme) == "pack-quantized" for scheme in schemes.values())
    return f"vllm serve {output}" + (" --linear-backend humming" if integer else "")


def ignored(skeleton: nn.Module, quantized: Mapping[str, Any]) -> list[str]:
    """Return the modules with a matrix in floating point, without embeddings, which the format never quantizes."""
    named = skeleton.named_parameters(remove_duplicate=False)
    others = [path for path in (name.rpartition(".")[0] for name, p in named if p.dim() == 2) if path not in quantized]
    return list(dict.fromkeys(p for p in others if not isinstance(skeleton.get_submodule(p), nn.Embedding)))


def compressed_tensors_parity(
    directory: Path, written: Path, schemes: Mapping[str, Scheme], dtype: torch.dtype
) -> dict[str, float]:
    """Measure how far the checkpoint in transformers is from the artifact, on the artifact's two probes.

    For symmetric activations the package uses steps of max/7.5 or max/127.5, not max/7 or max/127. So if activations
    are rounded, two right answers differ by about as much as rounding moves them.

    Weights with packed zero points are unpacked on loading, because version 0.20 of the package otherwise expects zero
    points that are not packed. It unpacks them to the dtype that the model is stored in, and so the checkpoint is
    compared with the artifact's weights in that dtype.

    Args:
        directory: the artifact.
        written: the checkpoint.
        schemes: the scheme of each quantized linear, by path.
        dtype: the dtype that the float model is stored in.

    Returns:
        reference: ‖difference‖ / ‖output‖, the larger one of the two probes.
        activations: how far the artifact is from itself with floating-point activations, for comparison.

    Raises:
        QuantizeError: the checkpoint cannot be loaded, or rounding does not explain the difference.
    """
    inputs, model, options = probe_inputs(directory), load(directory, engine="reference"), dict[str, Any]()
    round_tables(model, dtype)
    model = copy_with_replaced_linears(model, lambda x: as_float(x, dtype) if x.scheme == TABLE_SCHEME else x)
    if any(map(has_packed_zero_points, schemes.values())):
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
        model = copy_with_replaced_linears(model, lambda layer: as_float(layer, dtype))
    expected = first_outputs(model, inputs)
    found = {
        "reference": relative_error(outputs_of(written, inputs, running_type(schemes), **options), expected),
        "activations": relative_error(
            first_outputs(copy_with_replaced_linears(model, with_float_activations), inputs), expected
        ),
    }
    check_difference(found["reference"], torch.finfo(running_type(schemes)).eps, found["activations"], expected)
    return found


def running_type(schemes: Mapping[str, Scheme]) -> torch.dtype:
    """Return the dtype to run a checkpoint in: bfloat16 for FP4, because the package unpacks it to that, or float32."""
    elements = {get_format(scheme.weights.format).element for scheme in schemes.values()}
    return torch.bfloat16 if "e2m1" in elements else torch.float32
