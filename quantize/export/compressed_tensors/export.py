"""An artifact is exported as a compressed-tensors checkpoint, which transformers and vLLM load.

The package of that name is not needed to write a checkpoint; if it is installed, the checkpoint is loaded and compared.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from quantize.artifact.writer import ArtifactWriter, as_json
from quantize.errors import UsageError
from quantize.export.compressed_tensors.activation_ranges import input_divisors
from quantize.export.compressed_tensors.experts import (
    names_in_checkpoints,
    rows_of,
    with_experts,
    written_parts,
)
from quantize.export.compressed_tensors.experts_apart import Parts
from quantize.export.compressed_tensors.format import held_schemes, is_packed, quantization_config, storage, stored
from quantize.export.compressed_tensors.obstacles import not_executed
from quantize.export.compressed_tensors.parity import compressed_tensors_parity, running_type
from quantize.export.hf_checkpoint import shards
from quantize.export.outline import Outline
from quantize.formats import get_format
from quantize.nn.quantized_experts import QuantizedExperts
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.scheme.scheme import Scheme


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
    schemes, stacks, names = held_schemes(outline), written_parts(outline), names_in_checkpoints(outline)
    biases = {parts.bias: parts.linears for parts in stacks.values()}
    scaled = {path for path, scheme in schemes.items() if get_format(scheme.weights.format).has_global_scale}
    if not scaled and calibration is not None:
        raise UsageError("only NVFP4 checkpoints hold ranges of activations; leave --calibration out")
    divisors = input_divisors(directory, calibration) if scaled else {}

    def compressed(path: str, linear: QuantizedLinear | QuantizedExperts) -> dict[str, Tensor]:
        weight, packed = linear.qtensor(), is_packed(linear.scheme)
        if isinstance(linear, QuantizedExperts):
            parts = {place: stored(rows_of(weight, rows), packed) for place, rows in stacks[path].linears.items()}
            return {f"{place}.{name}": tensor for place, part in parts.items() for name, tensor in part.items()}
        found = {} if linear.bias is None else {"bias": linear.bias}
        if path in schemes:
            found |= stored(weight, packed) | ({"input_global_scale": divisors[path]} if path in scaled else {})
        else:
            found |= {"weight": weight.dequantize().to(linear.scale.dtype)}
        place = names.get(f"{path}.weight", f"{path}.weight").removesuffix(".weight")
        return {f"{place}.{name}": tensor for name, tensor in found.items()}

    def named(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if name in biases:
            return {f"{place}.bias": tensor.flatten()[rows] for place, rows in biases[name].items()}
        return {names.get(name, name): tensor}

    for shard, tensors in shards(directory, outline, compressed, console):
        writer.add(shard, {at: x for name, tensor in tensors.items() for at, x in named(name, tensor).items()})
    writer.write_index()
    own = {"dtype": "bfloat16"} if running_type(schemes) == torch.bfloat16 else {}
    held = {*schemes, *(path.rpartition(".")[0] for path in stacks)}
    entry = quantization_config(with_experts(schemes, stacks), ignored(outline.skeleton, held, names))
    writer.write("config.json", as_json({**outline.config, **own, "quantization_config": entry}))
    if console is not None:
        console.print(how_to_serve(writer.output, outline, schemes, stacks), soft_wrap=True, markup=False)
    if find_spec("compressed_tensors") is None:
        return {"parity": {"transformers": "not verified"}}
    return {"parity": compressed_tensors_parity(directory, writer.directory, outline, schemes, stacks)}


def how_to_serve(output: Path, outline: Outline, schemes: Mapping[str, Scheme], stacks: Mapping[str, Parts]) -> str:
    """Return a line with the command that serves a checkpoint, or that says why vLLM does not."""
    if why := not_executed("vllm", outline, stacks):
        return f"vLLM does not serve it: {why}"
    return f"to serve it: {serve_command(output, schemes, outline.settings.get('kv_cache'))}"


def serve_command(output: Path, schemes: Mapping[str, Scheme], kv_cache: Mapping[str, Any] | None = None) -> str:
    """Return the command with which vLLM serves a checkpoint; without its flags vLLM leaves activations in floats.

    vLLM rotates keys within each head itself, and takes a scale and a zero point for each token of each head.
    """
    integer = any(scheme.activations is not None and storage(scheme) == "pack-quantized" for scheme in schemes.values())
    cache = f" --kv-cache-dtype int{kv_cache['num_bits']}_per_token_head" if kv_cache else ""
    return f"vllm serve {output}" + (" --linear-backend humming" if integer else "") + cache


def ignored(skeleton: nn.Module, quantized: Collection[str], names: Mapping[str, str]) -> list[str]:
    """Return the modules with a matrix in floating point, without embeddings, which the format never quantizes.

    Args:
        skeleton: the float model.
        quantized: the paths of the quantized linears, and of what holds stacks of experts.
        names: parameter → its name in checkpoints, where that may be another one; vLLM knows modules by these.
    """
    named = skeleton.named_parameters(remove_duplicate=False)
    found = [(name.rpartition(".")[0], names.get(name, name).rpartition(".")[0]) for name, p in named if p.dim() == 2]
    others = [pair for pair in found if pair[0] not in quantized]
    kept = [pair for pair in others if not isinstance(skeleton.get_submodule(pair[0]), nn.Embedding)]
    return list(dict.fromkeys([path for pair in kept for path in pair]))
