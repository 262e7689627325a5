"""An artifact as a checkpoint of the compressed-tensors format, which transformers and vLLM load.

The package of that name is not needed to write one; where it is installed, the checkpoint is loaded and compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from quantize.artifact.load import load
from quantize.artifact.writer import ArtifactWriter, as_json
from quantize.errors import UsageError
from quantize.export.comparison import copy_with_replaced_linears, first_outputs, relative_error, with_float_activations
from quantize.export.compressed_tensors.activation_ranges import input_divisors
from quantize.export.compressed_tensors.format import quantization_config, stored
from quantize.export.hf_checkpoint import ROUNDING, check_difference, outputs_of, probe_inputs, shards
from quantize.export.outline import Outline
from quantize.formats import get_format
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.scheme.scheme import Scheme


def export_compressed_tensors(
    directory: Path, writer: ArtifactWriter, calibration: Path | None = None
) -> dict[str, Any]:
    """Write the safetensors shards, their index and `config.json`, one shard in memory at a time; then compare.

    Args:
        directory: an artifact that `obstacles` finds nothing in.
        writer: open; what else belongs to a model is the caller's.
        calibration: data for NVFP4, as for quantizing; None takes the bundled prose.

    Returns:
        `parity`: what `compressed_tensors_parity` measured, or `{"transformers": "not verified"}` where the package
        is not installed.

    Raises:
        UsageError: data that are not needed, or not what the model takes.
        QuantizeError: damaged files, or transformers computes something else.
    """
    outline = Outline.read(directory)
    schemes = outline.schemes()
    scaled = {path for path, scheme in schemes.items() if get_format(scheme.weights.format).has_global_scale}
    if not scaled and calibration is not None:
        raise UsageError("only NVFP4 checkpoints hold ranges of activations; leave --calibration out")
    divisors = input_divisors(directory, calibration) if scaled else {}

    def compressed(path: str, linear: QuantizedLinear) -> dict[str, Tensor]:
        bias = {} if linear.bias is None else {"bias": linear.bias}
        divisor = {"input_global_scale": divisors[path]} if path in scaled else {}
        return stored(linear.qtensor(), linear.scheme.activations is None) | bias | divisor

    for shard, tensors in shards(directory, outline, compressed):
        writer.add(shard, tensors)
    writer.write_index()
    own = {"dtype": "bfloat16"} if running_type(schemes) == torch.bfloat16 else {}
    entry = quantization_config(schemes, ignored(outline.skeleton, schemes))
    writer.write("config.json", as_json({**outline.config, **own, "quantization_config": entry}))
    if find_spec("compressed_tensors") is None:
        return {"parity": {"transformers": "not verified"}}
    return {"parity": compressed_tensors_parity(directory, writer.directory, schemes)}


def ignored(skeleton: nn.Module, quantized: Mapping[str, Any]) -> list[str]:
    """Modules that hold a matrix and stay in floating point, but for embeddings, which the target does not mean."""
    named = skeleton.named_parameters(remove_duplicate=False)
    others = [path for path in (name.rpartition(".")[0] for name, p in named if p.dim() == 2) if path not in quantized]
    return list(dict.fromkeys(p for p in others if not isinstance(skeleton.get_submodule(p), nn.Embedding)))


def compressed_tensors_parity(directory: Path, written: Path, schemes: Mapping[str, Scheme]) -> dict[str, float]:
    """How far transformers with the package is from the artifact, on the artifact's two probes.

    The package's steps of symmetric activations are max/7.5 or max/127.5, not max/7 or max/127, so where activations
    are rounded, two right answers differ by about as much as rounding them does.

    Weights alone are unpacked as they are loaded: otherwise the package 0.20 expects zero points that are not packed.

    Args:
        directory: the artifact.
        written: the checkpoint.
        schemes: what each linear of both is quantized to, by path.

    Returns:
        reference: ‖difference‖ / ‖output‖, the larger of the two.
        activations: the yardstick, how far the artifact is from itself with floating-point activations.

    Raises:
        QuantizeError: it cannot be loaded, or rounding does not explain the difference.
    """
    inputs, model, options = probe_inputs(directory), load(directory), dict[str, Any]()
    if all(scheme.activations is None for scheme in schemes.values()):
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    expected = first_outputs(model, inputs)
    found = {
        "reference": relative_error(outputs_of(written, inputs, running_type(schemes), **options), expected),
        "activations": relative_error(
            first_outputs(copy_with_replaced_linears(model, with_float_activations), inputs), expected
        ),
    }
    check_difference(found["reference"], ROUNDING * torch.finfo(running_type(schemes)).eps + 2 * found["activations"])
    return found


def running_type(schemes: Mapping[str, Scheme]) -> torch.dtype:
    """What a checkpoint runs in: float32, or bfloat16, which is all that the package unpacks FP4 to."""
    elements = {get_format(scheme.weights.format).element for scheme in schemes.values()}
    return torch.bfloat16 if "e2m1" in elements else torch.float32
