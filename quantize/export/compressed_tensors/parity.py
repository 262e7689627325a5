"""A compressed-tensors checkpoint is compared with the artifact it was made of."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from quantize.artifact.load import load
from quantize.checkpoint.key_mapping import map_keys
from quantize.checkpoint.tensor_files import index_tensors, read_tensor
from quantize.errors import QuantizeError
from quantize.export.comparison import (
    as_float,
    as_float_stack,
    copy_with_replaced_linears,
    first_outputs,
    relative_error,
    round_tables,
    with_float_activations,
)  # fmt: skip
from quantize.export.compressed_tensors.experts import expert_linears, names_in_checkpoints
from quantize.export.compressed_tensors.format import group, has_packed_zero_points, storage
from quantize.export.hf_checkpoint import NotLoadedError, check_difference, outputs_of, probe_inputs
from quantize.export.outline import Outline
from quantize.formats import get_format
from quantize.nn.attention import set_kv_cache
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.scheme.scheme import TABLE_SCHEME, Scheme

UNPACKED = "with CompressedTensorsConfig(dequantize=True) alone"


def compressed_tensors_parity(
    directory: Path, written: Path, outline: Outline, schemes: Mapping[str, Scheme]
) -> dict[str, float | str]:
    """Measure how far the checkpoint in transformers is from the artifact, on the artifact's two probes.

    Keys and values stay in floating point, since a checkpoint says nothing of them.

    For symmetric activations the package uses steps of max/7.5 or max/127.5, not max/7 or max/127. So if activations
    are rounded, two right answers differ by about as much as rounding moves them.

    Weights with packed zero points are unpacked on loading, because version 0.20 of the package otherwise expects zero
    points that are not packed, and so are experts always, whose activations then stay in floating point. They are
    unpacked to the dtype that the model is stored in, and so the checkpoint is compared with the artifact's weights in
    that dtype. A checkpoint that transformers cannot load otherwise is unpacked as well, as a model's code may read the
    weights of linears when it is built.

    In a mixture of experts no activations are rounded for the comparison, since a small difference may send a token to
    another expert. Experts that are not packed integers are compared number by number (`tensor_difference`).

    Args:
        directory: the artifact.
        written: the checkpoint.
        outline: the artifact's outline.
        schemes: the scheme of each quantized linear, by path.

    Returns:
        reference: ‖difference‖ / ‖output‖, the larger one of the two probes.
        activations: how far the artifact is from itself with floating-point activations, for comparison.
        transformers: how it loads the checkpoint, if it has to be told.
        tensors: in place of all these, the largest difference of a tensor, relative to it.

    Raises:
        QuantizeError: the checkpoint cannot be loaded, or rounding does not explain the difference.
    """
    model, dtype, rounds = load(directory, engine="reference"), outline.dtype, not outline.experts
    round_tables(model, dtype)
    set_kv_cache(model, None)  # which vLLM quantizes by an option of its own
    model = copy_with_replaced_linears(
        model,
        lambda x: as_float(x, dtype) if x.scheme == TABLE_SCHEME else x,
        lambda experts: as_float_stack(experts, dtype),
    )
    if not {storage(schemes[path]) for path in outline.experts} <= {"pack-quantized"}:
        return {"tensors": tensor_difference(written, outline, schemes, model)}
    inputs, running = probe_inputs(directory), running_type(schemes)
    if any(map(has_packed_zero_points, schemes.values())):
        return output_difference(written, inputs, model, running, rounds, unpacked=dtype)
    try:
        return output_difference(written, inputs, model, running, rounds)
    except NotLoadedError:
        with contextlib.suppress(NotLoadedError):  # transformers unpacks all linears as those of the first scheme
            return output_difference(written, inputs, model, running, rounds, unpacked=dtype)
        raise


def output_difference(
    written: Path,
    inputs: list[dict[str, Tensor]],
    model: nn.Module,
    dtype: torch.dtype,
    rounds: bool,
    unpacked: torch.dtype | None = None,
) -> dict[str, float | str]:
    """Compare the outputs of a checkpoint in transformers with those of an artifact.

    Args:
        written: the checkpoint.
        inputs: the inputs of each call.
        model: the artifact.
        dtype: the dtype in which the checkpoint runs.
        rounds: whether activations are rounded for the comparison.
        unpacked: the dtype to which both are unpacked; None runs the checkpoint as transformers loads it by itself.

    Raises:
        NotLoadedError: transformers cannot load the checkpoint.
        QuantizeError: rounding does not explain the difference.
    """
    options: dict[str, Any] = {}
    if unpacked is not None:
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
        model = copy_with_replaced_linears(model, lambda layer: as_float(layer, unpacked))
    exact = copy_with_replaced_linears(model, with_float_activations)
    rounded, floats = first_outputs(model, inputs), first_outputs(exact, inputs)
    outputs = outputs_of(written, inputs, dtype, rounds, **options)
    reference, activations = relative_error(outputs, rounded if rounds else floats), relative_error(floats, rounded)
    check_difference(reference, torch.finfo(dtype).eps, activations * rounds, rounded)
    found: dict[str, float | str] = {"reference": reference, "activations": activations}
    return found if unpacked is None else found | {"transformers": UNPACKED}


def running_type(schemes: Mapping[str, Scheme]) -> torch.dtype:
    """Return the dtype to run a checkpoint in: bfloat16 for FP4, because the package unpacks it to that, or float32."""
    elements = {get_format(scheme.weights.format).element for scheme in schemes.values()}
    return torch.bfloat16 if "e2m1" in elements else torch.float32


def tensor_difference(written: Path, outline: Outline, schemes: Mapping[str, Scheme], model: nn.Module) -> float:
    """Compare all parameters of a checkpoint, unpacked by the package and put together by transformers' mapping.

    Args:
        written: the checkpoint.
        outline: the artifact's outline.
        schemes: the scheme of each quantized linear, by path.
        model: the artifact with the parameters of experts in floating point, in the dtype that they are stored in.

    Returns:
        The largest ‖difference‖ / ‖parameter‖.

    Raises:
        QuantizeError: a parameter is not there, or not the artifact's.
    """
    files, stacks, names = index_tensors(written), expert_linears(outline), names_in_checkpoints(outline)
    own = {path: [names[f"{path}.weight"].removesuffix(".weight")] for path in schemes if path not in stacks}
    places = {place: scheme for path, scheme in schemes.items() for place in {**own, **stacks}[path]}
    paths = {name: name.rpartition(".")[0] for name in files}

    def read(name: str) -> Tensor:
        path = name.removesuffix(".weight")
        if path not in places:
            return read_tensor(files[name], name)
        parts = {part.removeprefix(f"{path}."): read_tensor(files[part], part) for part in paths if paths[part] == path}
        return unpacked(parts, places[path])

    stored = [*(name for name in files if paths[name] not in places), *(f"{path}.weight" for path in places)]
    sources = map_keys(outline.skeleton, {name: name for name in stored})
    expected, worst = {name: p.detach() for name, p in model.named_parameters()}, 0.0
    linears = ((path, layer) for path, layer in model.named_modules() if isinstance(layer, QuantizedLinear))
    expected |= {f"{path}.weight": as_float(layer, outline.dtype).weight.data for path, layer in linears}
    for name, tensor in expected.items():
        if name not in sources:
            raise QuantizeError(
                f"the checkpoint holds no {name}, which the model needs; report the model and the recipe"
            )
        worst = max(worst, relative_error([sources[name].read(name, read)], [tensor]))
    check_difference(worst, torch.finfo(torch.float32).eps, 0, [*expected.values()])
    return worst


def unpacked(tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """Return the weight [N, K] that the package makes of the tensors of one linear."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    compressor = BaseCompressor.get_value_from_registry(storage(scheme))
    weight: Tensor = compressor.decompress(dict(tensors), QuantizationScheme(**group(scheme, ["Linear"])))["weight"]
    return weight
