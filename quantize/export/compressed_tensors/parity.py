"""A compressed-tensors checkpoint is compared with the artifact it was made of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from quantize.artifact.load import load
from quantize.export.comparison import (
    as_float,
    as_float_stack,
    copy_with_replaced_linears,
    first_outputs,
    relative_error,
    round_tables,
    with_float_activations,
)  # fmt: skip
from quantize.export.compressed_tensors.experts_apart import Parts
from quantize.export.compressed_tensors.format import UNPACKED, has_packed_zero_points, storage
from quantize.export.compressed_tensors.read_back import read_back, tensor_difference
from quantize.export.hf_checkpoint import NotLoadedError, check_difference, outputs_of, probe_inputs
from quantize.export.outline import Outline
from quantize.formats import get_format
from quantize.nn.attention import set_kv_cache
from quantize.nn.quantized_experts import replace_parameter
from quantize.scheme.scheme import TABLE_SCHEME, Scheme

APART = "not at all, as it holds these experts in one tensor and reads no others"


def compressed_tensors_parity(
    directory: Path, written: Path, outline: Outline, schemes: Mapping[str, Scheme], stacks: Mapping[str, Parts]
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
    another expert. Experts that are not packed integers are compared number by number (`tensor_difference`), and so are
    experts apart that transformers holds in one tensor, which its float model then runs with as well.

    Args:
        directory: the artifact.
        written: the checkpoint.
        outline: the artifact's outline.
        schemes: the scheme of each quantized linear, by path.
        stacks: the linears in the place of each stack of experts.

    Returns:
        reference: ‖difference‖ / ‖output‖, the larger one of the two probes.
        activations: how far the artifact is from itself with floating-point activations, for comparison.
        transformers: how it loads the checkpoint, if it has to be told, or why it does not.
        tensors: the largest difference of a tensor, relative to it, where tensors are compared; in place of the others
            where experts do not run.

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
    inputs, running = probe_inputs(directory), running_type(schemes)
    if not all(parts.mapped for parts in stacks.values()):
        read = read_back(written, outline, schemes, stacks)
        return difference_apart(read, inputs, model, dtype) | {"transformers": APART}
    if not {storage(schemes[path]) for path in outline.experts} <= {"pack-quantized"}:
        model = copy_with_replaced_linears(model, lambda layer: as_float(layer, dtype))
        return {"tensors": tensor_difference(read_back(written, outline, schemes, stacks), model)}
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


def difference_apart(
    read: Callable[[str], Tensor], inputs: list[dict[str, Tensor]], model: nn.Module, dtype: torch.dtype
) -> dict[str, float | str]:
    """Compare a checkpoint that transformers cannot load, put into the float model, with an artifact.

    Args:
        read: reads a parameter of the checkpoint, as `read_back` returns it.
        inputs: the inputs of each call.
        model: the artifact, with the parameters of experts in floating point.
        dtype: the dtype to which both are unpacked.

    Raises:
        QuantizeError: the two differ.
    """
    rounded = first_outputs(model, inputs)
    model = copy_with_replaced_linears(model, lambda layer: as_float(layer, dtype))
    floats, tensors = first_outputs(model, inputs), tensor_difference(read, model)
    model = copy_with_replaced_linears(model, with_float_activations)  # whose modules are not the artifact's
    for name in [name for name, _ in model.named_parameters()]:
        replace_parameter(model, name, nn.Parameter(read(name).float(), requires_grad=False))
    reference = relative_error(first_outputs(model, inputs), floats)
    check_difference(reference, torch.finfo(torch.float32).eps, 0, floats)
    return {"reference": reference, "activations": relative_error(floats, rounded), "tensors": tensors}
