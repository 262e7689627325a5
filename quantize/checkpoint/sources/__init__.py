"""Checkpoints that are quantized already: each source finds which float tensors can be made of what is stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from quantize.checkpoint.sources import awq, compressed_tensors, fp8, gptq, modelopt, mxfp4
from quantize.checkpoint.sources.encoded import Encoded, Entries
from quantize.errors import UsageError, shown
from quantize.scheme.names import METHOD

SOURCES: Mapping[str, Callable[[Mapping[str, Any], Entries], dict[str, Encoded]]] = {
    "awq": awq.find,
    "compressed-tensors": compressed_tensors.find,
    "fp8": fp8.find,
    "gptq": gptq.find,
    "modelopt": modelopt.find,
    "mxfp4": mxfp4.find,
}


def find_encoded(settings: Any, entries: Entries, where: str) -> dict[str, Encoded]:
    """Return the float tensors that can be made of what the files hold, by the names that they would have as floats.

    Args:
        settings: the config's `quantization_config`.
        entries: the headers of the files.
        where: the model's directory, for errors.

    Raises:
        UsageError: the model is quantized by a method that cannot be read, or holds no weights of the method it names.
        QuantizeError: a part of a tensor is missing, or the config's blocks are none.
    """
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method == METHOD:
        raise UsageError(
            f"{where} is an artifact of quantize-model; write it in floating point with quantize-model export --format "
            "safetensors-float and give that, whose grids are found again and kept exactly"
        )
    if not isinstance(method, str) or method not in SOURCES:
        raise UsageError(
            f"{where} is quantized already, by {shown(method)}, which cannot be read; known are {', '.join(SOURCES)}, "
            "so give one of these or the floating-point model"
        )
    found = SOURCES[method](settings, entries)
    if not found:
        raise UsageError(
            f"{where} is quantized by {method}, says its config, but its files hold no such weights; fetch the whole "
            "model, or take quantization_config out of the config if the weights are floating point"
        )
    return found
